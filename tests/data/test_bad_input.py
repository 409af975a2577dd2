"""Each bad input ends with one line that names the file, the line or the key, and leaves nothing behind."""

import gzip
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

Refused = Callable[..., str]
EVERYTHING = {"min_user": 1, "min_item": 1, "candidates": 2}
GOOD = "".join(f"{user}::{item}::4::97830{user}76{item}\n" for user in range(1, 4) for item in range(1, 5))

TIMED = '{"user": "u", "item": "i", "timestamp": 5}\n'
ZONED = TIMED.replace("5", '"2020-01-01T00:00:00Z"')
RATED = '{"user": 1, "item": "i", "rating": 5}\n'


def ml(path: str | Path, **more: Any) -> dict[str, Any]:
    return {"dataset": {"name": "ml-1m", "path": str(path), **more}, "prepare": EVERYTHING}


def own(path: str | Path, **more: Any) -> dict[str, Any]:
    return {"dataset": {"name": "file", "path": str(path), **more}, "prepare": EVERYTHING}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD + "3::9::4\n", ("ratings.dat, line 13", "expected 4 fields", "found 3", "3::9::4")),
        (GOOD + "3::9", ("line 13", "found 2")),
        (GOOD[:-4], ("line 12", "cut short", "3::4::4::97830")),
        (GOOD + "3::9::4::\n", ("line 13", "timestamp is missing")),
        (GOOD.replace("2::2::4", "2::2::four"), ("line 6", "rating is not a number", "four")),
        (GOOD.replace("2::2::4", "2::2::nan"), ("line 6", "rating is not a finite number")),
        (GOOD.replace("2::2::4::", "2::2::4::x"), ("line 6", "timestamp is neither a number nor a date")),
        (GOOD.replace("1::3::", "::3::"), ("line 3", "user id is empty")),
        (GOOD.replace("::", "\t"), ("line 1", "expected 4 fields between separators '::'", "found 1")),
        (GOOD.replace("::", ","), ("line 1", "found 1")),
        (GOOD.replace("1::3::", "1:3::"), ("line 3", "found 3")),
        ("\n\n", ("is empty",)),
    ],
)
def test_ratings_dat(refused: Refused, project: Path, text: str, words: tuple[str, ...]) -> None:
    (project / "ratings.dat").write_text(text)
    message = refused(**ml("ratings.dat"))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b,timestamp\nu,i,1\n", ("no column 'user'", "found 'a', 'b', 'timestamp'", "dataset.columns.user")),
        ("user,item,timestamp\n", ("is empty",)),
        ("user,item,user\nu,i,u\n", ("'user' is there 2 times",)),
        ("user,item,timestamp\nu,i,1\nu,,2\n", ("line 3", "item id is empty")),
        ("user,item,timestamp\nu,i,1\n\nu,i,soon\n", ("line 4", "timestamp is neither a number nor a date")),
        ("user,item,timestamp\nu,i,2020-01-01\nu,i,7\n", ("line 3", "is a number, unlike those before")),
        ('user,item,timestamp\n"u\nv",i,1\nu,i\n', ("line 4", "expected 3 fields", "found 2")),
        (
            "user,item,rating\nu,i,5\nu,j,\n",
            ("line 3", "rating is missing; if ratings are not needed, set dataset.columns.rating to null"),
        ),
        ("user,item,rating\nu,i,good\n", ("line 2", "rating is not a number", "set dataset.columns.rating to null")),
        ("user;item;rating\nu;i;3,5\n", ("line 2", "rating has a comma in place of a point")),
        ("user,item\nu,i,5\n", ("line 2", "expected 2 fields", "found 3")),
        (b"user,item\nu,\xff\xfe\n", ("line 2", "not UTF-8 text (save the file as UTF-8)")),
        ("user,item,timestamp\nu,i,2020-13-45\n", ("line 2", "timestamp is neither a number nor a date")),
        ("user,item,timestamp\nu,i,1_000\n", ("line 2", "timestamp is neither a number nor a date")),
        ("user,item\nu,i\n".encode("utf-16"), ("line 1", "not UTF-8")),
        ("user,item,timestamp\nu,i,2020-01-01\nu,i,2020-01-01T00:00Z\n", ("line 3", "is a date with a zone, unlike")),
        ("user,item,rating\nu,i,1\nu,i,1e39\n", ("line 3", "rating is too large, beyond 3.4e38")),
        ("\n\nuser,item\nu,i\n", ("line 1: blank", "remove the blank lines")),
        ("\n\n", ("is empty",)),
        ("user,item,timestamp\nu,i,inf\n", ("line 2", "timestamp is not a finite number")),
        ("user,item,timestamp\nu,i,1\nu,i,1e300\n", ("line 3", "timestamp is too large, beyond 9.2e18")),
        ("user,item,Timestamp\nu,i,1\n", ("no column 'timestamp', but one that differs in capital letters", "'Timestamp'")),
        ("7,2010-10-19T23:55:27Z,30.2,-97.7,22847\n", ("line 1", "are values, not names", "put a line of names above it")),
        ("A2,B00X,5.0,1370000000\n", ("line 1", "'A2, B00X, 5.0, 1370000000' are values, not names of columns")),
        ("3,1,2\n4,1,3\n", ("line 1", "are values, not names of columns")),
        ("0,1,2\nu,i,3\n", ("no column 'user'; found '0', '1', '2'",)),
        ("who,item,2010-10-19\nu,i,3\n", ("no column 'user'; found 'who'",)),
        ('user,item\nu,b\nu,"A" side\n', ("line 3", "text follows the quote that closes a field", '"A" side')),
        ('user,item\nu,"it\\"em"\n', ("line 2", "text follows the quote that closes a field")),
        ('user,item\nu,"a\nb"\nu,"c"d\n', ("line 4", "text follows the quote that closes a field")),
    ],
)
def test_own_csv(refused: Refused, project: Path, text: str | bytes, words: tuple[str, ...]) -> None:
    (project / "mine.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(**own("mine.csv"))
    assert "mine.csv" in message and all(word in message for word in words), message


def test_times_are_not_taken_from_the_first_of_lines_without_names(refused: Refused, project: Path) -> None:
    (project / "mine.csv").write_text("7,22847,2010-10-19\n7,22848,2010-10-20\n")
    message = refused(**own("mine.csv", columns={"user": "7", "item": "22847", "timestamp": "2010-10-19"}))
    assert "line 1: '7, 22847, 2010-10-19' are values, not names of columns" in message


@pytest.mark.parametrize("size", [1, 200_000])  # the second is more than pyarrow takes at once
@pytest.mark.parametrize(
    ("header", "opened", "row", "shut"),
    [
        ("user\titem\ttimestamp\ttitle", 'u\tc\t3\t"open', "v\td\t4\tthe title", 'u\tg\t7\tshut"'),
        ("user\ttitle\titem", 'u\t"open\ta', "v\tthe title, which is long\tb", 'u\tshut"\tc'),
        ("user,item,title", 'u,a,"open', "v,b,the title of it all", 'u,c,"Shut"'),
        ("user,item,title", 'u,a,"open', "v,b,the title of it all", "u,c,never"),
    ],
)
def test_quote_that_is_not_closed(
    refused: Refused, project: Path, header: str, opened: str, row: str, shut: str, size: int
) -> None:
    text = "\n".join([header, row, row.replace("title", '"Best" title'), opened, *[row] * size, shut, row, ""])
    (project / "mine.tsv.gz").write_bytes(gzip.compress(text.encode(), 1))
    message = refused(**own("mine.tsv.gz"))
    assert "mine.tsv.gz, line 4: a quote at the start of a field is closed only lines later" in message


def test_separators(refused: Refused, project: Path) -> None:
    (project / "mine.csv").write_text("user;item\nu;i\n")
    assert "found 'user;item'" in refused(**own("mine.csv", separator=","))
    assert "one character, not '::'" in refused(**own("mine.csv", separator="::"))


def test_named_column_that_is_not_there(refused: Refused, project: Path) -> None:
    (project / "mine.csv").write_text("user,item,when\nu,i,1\n")
    message = refused(**own("mine.csv", columns={"timestamp": "time"}))
    assert "no column 'time'" in message and "'when'" in message and "dataset.columns.timestamp" in message


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"timestamp": "user"}, ("columns.user and dataset.columns.timestamp are both 'user'", "set the latter to null")),
        ({"item": "rating"}, ("columns.item and dataset.columns.rating are both 'rating'", "set the latter to null")),
        ({"item": "user"}, ("columns.user and dataset.columns.item are both 'user'", "name another column")),
    ],
)
def test_one_column_for_two_things(refused: Refused, project: Path, named: dict[str, str], words: tuple[str, ...]) -> None:
    (project / "mine.csv").write_text("user,item,rating\n007,a,1\n7,b,2\n")
    message = refused(**own("mine.csv", columns=named))
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"user": "u", "item": "i"}\n{"user": "u", "it', ("line 2", "not JSON")),
        ('{"user": "u", "item": "i"}\n{"user": "u"}\n', ("line 2", "'item' is missing")),
        ('{"user": "u", "item": "i", "rating": 1}\n{"user": "u", "item": "i", "rating": "x"}\n', ("line 2", "rating")),
        ('{"user": "u"}\n', ("no column 'item'",)),
        ('\n{"user": "u", "item": "i"}\n' + TIMED, ("line 2", "'timestamp' is missing, but line 3 has it")),
        ('{"user": 1, "item": "i"}\n' + RATED, ("line 1", "'rating' is missing, but line 2 has it")),
        (TIMED + '{"user": "u", "item": "i"}\n', ("line 2", "'timestamp' is missing")),
        ('{"user": 1, "item": "i"}\n{"user": "u", "item": "i"}\n', ("line 2", "'user' is text, unlike those before")),
        ('{"user": 1, "item": 2}\n{"user": 2, "item": 2.5}\n', ("line 2", "'item' is a fraction")),
        ('{"user": 1, "item": 99999999999999999999}\n', ("line 1", "'item' is too large a number; write ids as text")),
        (RATED + RATED.replace("}", ', "category": [1, "x"]}'), ("line 2", "'category' is a list of different kinds")),
        (RATED.replace("5", "[5]"), ("line 1", "'rating' is missing or is not a single value")),
        (TIMED.replace("5", '{"at": 5}'), ("line 1", "'timestamp' is missing or is not a single value")),
        (RATED + RATED.replace("5", "-1e39"), ("line 2", "rating is too large, beyond 3.4e38")),
        (ZONED + ZONED.replace("Z", ""), ("line 2", "'timestamp' is a date without a zone as text, unlike those before")),
        (TIMED + TIMED.replace("5", '"5"'), ("line 2", "'timestamp' is a number as text, unlike those before")),
        ("1\n", ("line 1", "not a JSON object")),
        ('[\n{"user": 1, "item": 2}]\n', ("line 1", "a JSON array begins here; write its objects one a line")),
        ("user,item\n", ("line 1", "not JSON")),
        ("\n", ("is empty",)),
    ],
)
def test_jsonl(refused: Refused, project: Path, text: str, words: tuple[str, ...]) -> None:
    (project / "mine.jsonl").write_text(text)
    message = refused(**own("mine.jsonl"))
    assert all(word in message for word in words), message


def test_parquet(refused: Refused, project: Path) -> None:
    path = project / "mine.parquet"
    path.write_bytes(b"PAR1 not really")
    assert "not a readable parquet file" in refused(**own(path)) or "damaged" in refused(**own(path))
    for columns, words in (
        ({"user": ["a"], "thing": ["b"]}, "no column 'item'"),
        ({"user": ["a", None], "item": ["b", "c"]}, "row 2: the user id is missing"),
        ({"user": ["a", "b"], "item": ["b", ""]}, "row 2: the item id is empty"),
        ({"user": ["a", "b"], "item": ["b", "c"], "rating": [1.0, None]}, "row 2: the rating is missing"),
        ({"user": ["a", "b"], "item": ["b", "c"], "timestamp": [1, None]}, "row 2: the timestamp is missing"),
        ({"user": ["a", "b"], "item": ["b", "c"], "rating": [1.0, 1e39]}, "row 2: the rating is too large, beyond 3.4e38"),
        ({"user": ["a"], "item": ["b"], "rating": ["good"]}, "rating is not a number"),
        ({"user": ["a"], "item": ["b"], "rating": ["good"]}, "set dataset.columns.rating to null"),
        ({"user": ["a"], "item": [["b", "c"]]}, "item ids are lists; write a row for each interaction"),
        ({"user": [1.5], "item": ["b"]}, "user ids are stored as decimals"),
        ({"user": [True], "item": ["b"]}, "user ids are truth values"),
        ({"user": pa.array([], pa.string()), "item": pa.array([], pa.string())}, "is empty"),
    ):
        pyarrow.parquet.write_table(pa.table(columns), path)
        assert words in refused(**own(path))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("sasrec", "1 2\n1\n", ("line 2", "expected 2 fields", "found 1")),
        ("sasrec", "1 2 3\n", ("line 1", "found 3")),
        ("s3rec", "1 2 3\n\n2\n", ("line 3", "at least one item")),
        ("s3rec", " \n", ("is empty",)),
        ("s3rec", b"1 2\n2 \xff\n", ("line 2", "not UTF-8")),
    ],
)
def test_line_files(refused: Refused, project: Path, name: str, text: str | bytes, words: tuple[str, ...]) -> None:
    (project / "a.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(dataset={"name": name, "path": "a.txt"}, prepare=EVERYTHING)
    assert all(word in message for word in words), message


def test_paths(refused: Refused, project: Path) -> None:
    message = refused(**own("nowhere/mine.csv"))
    assert "nowhere/mine.csv does not exist" in message and "--queue" in message and "must be absolute" in message
    assert "/nowhere/mine.csv does not exist" in refused(**own("/nowhere/mine.csv"))
    (project / "folder").mkdir()
    assert "folder is a directory" in refused(**own("folder"))
    (project / "empty.csv").touch()
    assert "empty.csv is empty" in refused(**own("empty.csv"))
    (project / "what.xyz").write_text("a")
    assert "dataset.format" in refused(**own("what.xyz"))
    for name in ("file", "sasrec", "s3rec"):
        assert "needs a local file" in refused(dataset={"name": name})
    (project / "mine.csv").write_text("user,item\n")
    for key, value in (("path", "mine.csv"), ("sha256", "0" * 64), ("format", "parquet"), ("separator", ";")):
        message = refused(dataset={"name": "sample", key: value})
        assert f"dataset.{key} is set, but the data set 'sample' is simulated" in message


def test_unknown_names(refused: Refused, project: Path) -> None:
    assert "unknown data set in dataset.name 'ml-1mm'; did you mean 'ml-1m'?" in refused(dataset={"name": "ml-1mm"})
    (project / "a.csv").write_text("user,item\n")
    message = refused(**own("a.csv", format="movielens_dat"))
    assert "did you mean 'movielens-dat'?" in message
    assert "unknown key 'dataset.nam'" in refused(dataset={"nam": "sample"})
    assert "prepare.min_usr" in refused(prepare={"min_usr": 5})


def test_a_usual_name_of_another_kind_of_file(refused: Refused, project: Path) -> None:
    """`ratings.csv` is MovieLens' name, and that of many other files."""
    (project / "ratings.csv").write_text("user,item,timestamp\nu,i,1\n")
    assert "set dataset.name to file, dataset.format to table" in refused(**own("ratings.csv"))
    # Who names columns means a file of columns.
    assert "no column 'who'; found 'user', 'item', 'timestamp'" in refused(**own("ratings.csv", columns={"user": "who"}))
    (project / "ratings.dat").write_text("1,2,3\n")
    assert "if the file is of another kind, name it in dataset.format" in refused(**own("ratings.dat"))


def test_the_file_to_mend_is_not_the_copy(refused: Refused, project: Path) -> None:
    (project / "mine.csv").write_text("user,item,timestamp\nu,i,soon\n")
    message = refused(**own("mine.csv"))
    assert "data/raw/mine.csv, line 2" in message
    assert message.rstrip().endswith("(data/raw/mine.csv is a copy: mend mine.csv itself)")


def test_everyone_below_the_threshold(refused: Refused, project: Path) -> None:
    (project / "ratings.dat").write_text(GOOD)
    message = refused(dataset={"name": "ml-1m", "path": "ratings.dat"})
    assert "prepare.min_user = 5" in message and "most active user has 4" in message and "lower" in message


def archive(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in members.items():
            file.writestr(name, text)
    return buffer.getvalue()


def test_archives(refused: Refused, project: Path) -> None:
    path = project / "ml-1m.zip"
    whole = archive({"ml-1m/ratings.dat": GOOD * 50})
    path.write_bytes(whole[: len(whole) // 2])
    assert "ml-1m.zip is not a zip archive, or is damaged" in refused(**ml(path))
    damaged = bytearray(whole)
    damaged[60:64] = b"\0\0\0\0"
    path.write_bytes(bytes(damaged))
    assert "cannot be unpacked" in refused(**ml(path))
    path.write_bytes(archive({"readme.txt": "x"}))
    assert "no data file in the archive (it holds: readme.txt)" in refused(**ml(path))
    path.write_bytes(archive({"a.csv": "user,item\n", "b.csv": "user,item\n"}))
    assert "more than one data file" in refused(**own(path))
    assert not (project / "data" / "raw").exists()
    for name in ("a.7z", "a.tar.gz"):
        (project / name).write_bytes(b"x")
        assert "archives of this kind" in refused(**own(name))


def test_a_file_with_the_name_of_the_note(refused: Refused, project: Path) -> None:
    (project / "source.json").write_text('{"user": "u", "item": "i"}\n')
    assert "source.json: a data file cannot be called source.json" in refused(**own("source.json", format="jsonl"))
    (project / "a.zip").write_bytes(archive({"source.json": '{"user": "u", "item": "i"}\n'}))
    assert "a.zip: a data file cannot be called source.json" in refused(**own("a.zip", format="jsonl"))


def test_an_id_that_could_not_be_read_back(refused: Refused, project: Path) -> None:
    for user, item in (("u", "i" * 140_000), ("u" * 140_000, "i")):
        (project / "mine.csv").write_text(f"user,item\n{user},{item}\n{user},b\n{user},c\n{user},d\n")
        assert "an id of 140000 characters, beyond the 131072" in refused(**own("mine.csv"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "mine.csv",
            gzip.compress(b"user,item\nu,i\n", mtime=0),
            "compressed by gzip, which its name does not say; rename it to mine.csv.gz",
        ),
        ("mine.csv", b"PAR1abcd", "is a parquet file; set dataset.name to file and dataset.format to parquet"),
        ("mine.xls", bytes.fromhex("d0cf11e0a1b11ae1"), "is a workbook of Excel"),
    ],
)
def test_files_of_another_kind_than_their_name(refused: Refused, project: Path, name: str, content: bytes, words: str) -> None:
    (project / name).write_bytes(content)
    assert words in refused(**own(name, format="table"))


def test_a_workbook(refused: Refused, project: Path) -> None:
    with zipfile.ZipFile(project / "mine.xlsx", "w") as file:
        file.writestr("[Content_Types].xml", "<Types/>")
        file.writestr("xl/worksheets/sheet1.xml", "<worksheet/>")
    assert "is a workbook of Excel, or another document of Office; save the table as csv" in refused(**own("mine.xlsx"))


def test_gzip(refused: Refused, project: Path) -> None:
    path = project / "a.csv.gz"
    whole = gzip.compress(os.urandom(5000).hex().encode())
    path.write_bytes(whole[:-20])
    assert "a.csv.gz is not a whole gzip file" in refused(**own(path))
    path.write_bytes(b"user,item\n")
    assert "a.csv.gz is not a whole gzip file" in refused(**own(path))
    path.write_bytes(gzip.compress(b""))
    assert "is empty" in refused(**own(path))
    assert not (project / "data" / "raw").exists()


def test_hash_of_a_local_file(refused: Refused, stage: Callable[..., None], project: Path) -> None:
    path = project / "mine.csv"
    path.write_text("user,item\nu,a\nu,b\nu,c\n")
    wrong = "0" * 64
    message = refused(**own(path, sha256=wrong))
    found = message.split("sha256 ")[1][:64]
    assert wrong in message and path.exists()
    assert "64 hexadecimal digits" in refused(**own(path, sha256="abc"))
    stage("fetch", **own(path, sha256=found.upper()))


def test_times_that_are_not_there(refused: Refused, project: Path) -> None:
    (project / "mine.csv").write_text("user,item\nu,a\nu,b\nu,c\n")
    assert "dataset.times is 'comparable'" in refused(**own("mine.csv", times="comparable"))


def test_prepare_before_fetch(stage: Callable[..., None], project: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        stage("prepare", dataset={"name": "sample"})
    assert "run the fetch stage again" in str(ended.value.code)


def test_exit_status_and_one_line_of_a_real_process(refused: Refused, project: Path) -> None:
    (project / "ratings.dat").write_text(GOOD + "3::9::4\n")
    refused(**ml("ratings.dat"))  # writes params.yaml
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run(
        [sys.executable, "-m", "stages.prepare"],
        env=os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1 and not ended.stdout
    assert ended.stderr.startswith("error: data/raw/ratings.dat, line 13") and ended.stderr.count("\n") == 1
