"""What is said of a merged reference: what to choose and to ship, in words, tables and figures."""

import itertools
from pathlib import Path

import pytest
from PIL import Image

from sasrec.compared import between
from sasrec.files import read_json, sha256, write_json
from sasrec.report import widths, widths_figure
from sasrec.report.readme import filled
from stages import reference as command
from tests.conftest import ROOT
from tests.merged.conftest import CARD, WHOLE, Make, merge


def test_what_to_ship_is_compared_over_the_seeds_of_both() -> None:
    """`wide` is better than `small` with the seed of both, though worse than its mean over two."""

    def whole(name: str, size: int, **by_seed: float) -> widths.Whole:
        values = {int(seed[1:]): value for seed, value in by_seed.items()}
        return widths.Whole(name, len(values), size, 0.0, 0.0, 0.0, sum(values.values()) / len(values), values)

    small, wide = whole("small", 100, s1=0.1, s2=0.5), whole("wide", 200, s1=0.2)
    equal, other = whole("equal", 200, s1=0.2), whole("other", 300, s3=0.15)
    found = widths.Widths((), (small, wide, equal, other), (), ()).smallest
    # Of the two that are level and of one size one; `other` shares no seed with them, and its mean is below theirs.
    assert [own.name for own in found] == ["small", "equal"]


def test_of_three_that_beat_each_other_in_a_circle_one_is_left() -> None:
    values = {"a": {0: 0.5}, "b": {0: 0.4, 1: 0.9}, "c": {0: 0.6, 1: 0.6}}  # c > a > b > c
    three = [widths.Whole(name, 1, 100, 0.0, 0.0, 0.0, sum(own.values()) / len(own), own) for name, own in values.items()]
    for models in itertools.permutations(three):
        assert [own.name for own in widths.Widths((), models, (), ()).smallest] == ["a"]


def test_four_lines_are_two_and_two() -> None:
    assert widths_figure.rows_of(["a"]) == [["a"]]
    assert widths_figure.rows_of(["a", "b", "c"]) == [["a", "a"], ["b", "c"]]
    assert widths_figure.rows_of(["a", "b", "c", "d"]) == [["a", "c"], ["b", "d"]]


def test_a_method_is_worth_it_above_the_line_of_full_precision_models(make: Make) -> None:
    content = merge(
        make("a", WHOLE | {"ptq": 3.0, "lsq": 0.0}, size=2000, quant={"bits": 4}),
        make("m", {"sasrec": 0.0, "h8": 1.0, "h16": 2.0}, size=2000),
    )
    # h16 is larger than h8 and worse, so that the line goes from h8 to sasrec, at log(2000 / 1500) / log(8000 / 1500).
    rows = {row["variant"]: row for row in content["frontier"]}
    assert rows["lsq-4-all"]["between"] == ["h8", "sasrec"] and rows["lsq-4-all"]["share"] == pytest.approx(0.17186, abs=1e-5)
    assert (rows["lsq-4-all"]["verdict"], rows["ptq-4-all"]["verdict"]) == ("worth it", "not worth it")
    values = {name: content["variants"][name]["ndcg@10"] for name in ("h8", "sasrec")}
    assert rows["lsq-4-all"]["base"] == pytest.approx(0.82814 * values["h8"] + 0.17186 * values["sasrec"], abs=1e-4)


def test_the_line_of_models() -> None:
    front = widths.undominated([("c", 400, 0.4), ("a", 100, 0.1), ("b", 200, 0.05), ("d", 800, 0.4)])
    assert front == [("a", 100, 0.1), ("c", 400, 0.4)]
    assert between(99, front) is None
    below, above, share = between(200, front) or ("", "", 0)
    assert (below, above) == ("a", "c") and share == pytest.approx(0.5)
    assert between(900, front) == ("c", "c", 0.0)


def test_widths_in_words() -> None:
    assert [widths.bits_text(1), widths.bits_text(2), widths.bits_text(4, 2, 1)] == ["1 bit", "2 bits", "4, 2 and 1 bits"]


def test_the_choice_in_words(make: Make) -> None:
    content = merge(
        make("a", WHOLE | {"ptq": 3.0, "ste": 0.0, "lsq": 0.0, "pact": 2.0}, size=2000, quant={"bits": 4}),
        make("m", {"sasrec": 0.0, "h8": 1.0}),
    )
    found = widths.load(content)
    assert content["choices"] == [
        {
            "bits": 4,
            "line": "all",
            "best": "ste-4-all",
            "tied": ["lsq-4-all"],
            "behind": ["ptq-4-all", "pact-4-all"],
            "ahead": [],
        }
    ]
    text = widths.words(found)
    assert "- 4 bits, every tensor: **ste**, 0 % (0 to 0) against control; tied with lsq.\n" in text
    assert "worth its bytes at 4 bits; not worth it: ptq and pact at 4 bits." in text
    row = next(line for line in widths.table(found).splitlines() if "| ptq |" in line)
    assert row.startswith("| 4 | all | ptq | 1 | 2.00 kB |") and row.endswith("of sasrec | worse | not worth it |")
    assert widths.short_table(found).splitlines()[2].startswith("| 4 | every tensor | ste | 0 % (0 to 0) |")


def test_where_no_training_is_needed_and_what_to_set(make: Make) -> None:
    tables = WHOLE | {"ptq": 2.0, "ste": 0.0, "lsq": 0.0}
    content = merge(
        make("a", WHOLE | {"ptq": 0.0, "ste": 0.0}, size=4000, quant={"bits": 8}),
        make("b", WHOLE | {"ptq": 0.0, "ste": 0.0}, size=2000, quant={"bits": 4}),
        make("c", tables, size=3000, quant={"bits": 8, "embedding_bits": 2}),
        make("d", tables, size=2000, quant={"bits": 4, "activation_bits": 8}),
        make("e", tables, size=3500, quant={"bits": 3, "preset": "paper"}),
    )
    found = widths.load(content)
    assert (
        widths.untrained_sentence(found)
        == "`ptq`, which needs no training, is the choice or tied with it at 8 and 4 bits (every tensor)."
    )
    assert widths.options_sentence(found) == (
        "To have them: every tensor, 8 bits: `-S quant.bits=8`; activations at 8 bits, 4 bits: `-S quant.bits=4 "
        "-S quant.activation_bits=8`; tables at 8 bits, 3 bits: `-S quant.bits=3 -S quant.preset=paper`; tables alone, the "
        "rest at 8 bits, 2 bits: `-S quant.bits=8 -S quant.embedding_bits=2`."
    )


def test_the_figure_is_that_of_the_file(make: Make) -> None:
    merge(make("a", WHOLE | {"ptq": 1.0, "lsq": 0.5}, quant={"bits": 4}), make("m", {"sasrec": 0.0, "h8": 1.0}))
    picture = Path("metrics/reference/bits/quality.png")
    first = picture.read_bytes()
    with Image.open(picture) as image:
        assert image.info["Source"] == f"sha256 {sha256('metrics/reference/bits.json')}"
    command.draw("bits")
    assert picture.read_bytes() == first and len(first) < 150_000


def test_the_documents_show_a_merged_reference_once_it_exists(make: Make) -> None:
    places = "".join(
        f"<!-- {kind}: metrics/reference/bits.json -->\n<!-- end of {kind} -->\n" for kind in ("choices", "short", "widths")
    )
    assert filled(places, Path("README.md")) == places
    merge(make("a", WHOLE | {"ptq": 1.0, "lsq": 0.5}, quant={"bits": 4}))
    text = filled(places, Path("README.md"))
    assert text.count("![Quality against bytes, a line a method](metrics/reference/bits/quality.png)") == 2
    assert "On real data ([bits](metrics/reference/README.md): 40 users, 30 items, 1 seed):" in text
    assert text.count("| 4 | every tensor | lsq |") == 2 and "\n40 users, 30 items, 1 seed.\n<!-- end of short -->" in text
    assert "| 4 | all | **lsq** | 1 | 1.00 kB |" in text
    assert "1 parts, 0.0 hours in all with 1 thread of x" in text
    assert "](bits/quality.png)" in filled(places, Path("metrics/reference/README.md"))
    assert filled(text, Path("README.md")) == text


def test_a_study_stands_beside_the_figures_that_others_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values = {"control": 0.5, "ste": 0.49, "lsq": 0.495}
    write_json(
        "source.json",
        {
            "params": {"quantized": list(values)}, "card": CARD,
            "published": [
                {"source": "Theirs", "variant": name, "sampled_ndcg@10": value}
                for name, value in {"control": 0.4, "lsq": 0.3}.items()
            ],
            "variants": {name: {"sampled_ndcg@10": value} for name, value in values.items()},
            "comparisons": [
                {"variant": "lsq", "reference": "control", "difference": -0.001, "low": -0.002, "high": 0.001,
                 "verdict": "within noise"},
            ],
        },
    )  # fmt: skip
    text = filled("<!-- beside: source.json -->\n<!-- end of beside -->", Path("README.md"))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[0].startswith("| method | Theirs: NDCG@10 |")
    assert rows[2] == "| full precision | 0.4000 |  | 0.5000 |  |  |"
    assert rows[3] == "| ste |  |  | 0.4900 | −2.0 % |  |"
    change = "−0.0010 (−0.0020 to +0.0010) against control, within noise"
    assert rows[4] == f"| lsq | 0.3000 | −25.0 % | 0.4950 | −1.0 % | {change} |"


MERGED = [path for path in (ROOT / "metrics/reference").glob("*.json") if "runs" in read_json(path)]


@pytest.mark.parametrize("file", MERGED, ids=lambda path: path.stem)
def test_committed_figures_show_the_committed_numbers(file: Path) -> None:
    with Image.open(file.with_suffix("") / "quality.png") as image:
        assert image.info["Source"] == f"sha256 {sha256(file)}", f"python -m stages.reference merge {file.stem} draws it again"
