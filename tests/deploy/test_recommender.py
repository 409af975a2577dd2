"""The runtime: original ids in and out, what it leaves out, what it refuses, and that its folder works alone."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sasrec.deploy import Recommender
from sasrec.deploy.artefact import Item, export
from sasrec.deploy.recommender import Recommendation
from sasrec.deploy.recommender.command import listed, main
from tests.conftest import ROOT
from tests.deploy.conftest import CATALOGUE, ITEMS, build

Export = Callable[..., Path]
HISTORY = ["sku/3", "sku/1", "sku/4"]


@pytest.fixture
def model(exported: Export) -> Recommender:
    return Recommender.load(exported())


def ids(result: Recommendation) -> list[str]:
    return [item.id for item in result.items]


def test_items_come_back_by_score_with_their_names(model: Recommender) -> None:
    result = model.recommend(HISTORY, k=5)
    scores = model.scores(np.array([[3, 1, 4]]))[0]
    scores[[0, 3, 1, 4]] = -np.inf
    expected = np.argsort(-scores, kind="stable")[:5]
    assert ids(result) == [f"sku/{i}" for i in expected]
    assert [item.score for item in result.items] == [float(scores[i]) for i in expected]
    assert result.items[0].title == f"Title {expected[0]}"
    assert (result.unknown, result.by_popularity) == (0, False)


def test_seen_items_come_back_only_when_asked_for(model: Recommender) -> None:
    assert not set(HISTORY) & set(ids(model.recommend(HISTORY, k=ITEMS)))
    assert set(ids(model.recommend(HISTORY, k=ITEMS, exclude_seen=False))) == {item.original for item in CATALOGUE}


def test_seen_items_are_left_out_even_beyond_what_the_model_sees(model: Recommender) -> None:
    history = [f"sku/{i}" for i in range(1, 13)]  # the model sees 8
    assert ids(model.recommend(history, k=ITEMS)) and not set(history) & set(ids(model.recommend(history, k=ITEMS)))


def test_allow_and_block(model: Recommender) -> None:
    everything = ids(model.recommend(HISTORY, k=ITEMS))
    allowed = {"sku/2", "sku/9", "sku/3", "sku/20", "nothing"}
    assert ids(model.recommend(HISTORY, k=10, allow=allowed)) == [i for i in everything if i in allowed]
    assert ids(model.recommend(HISTORY, k=ITEMS, block=everything[:3])) == everything[3:]
    assert ids(model.recommend(HISTORY, allow=allowed, block=["sku/9"])) == [i for i in everything if i in allowed - {"sku/9"}]
    assert ids(model.recommend(HISTORY, allow=[])) == []


def test_unknown_ids_are_dropped_and_counted(model: Recommender) -> None:
    with_unknown = model.recommend(["what", *HISTORY, "is this"], k=4)
    assert with_unknown.unknown == 2
    assert with_unknown.items == model.recommend(HISTORY, k=4).items


@pytest.mark.parametrize("history", [HISTORY, []])
def test_unknown_ids_of_allow_and_block_are_counted(model: Recommender, history: list[str]) -> None:
    result = model.recommend(history, allow=["sku/2", "typo", "sku/9"], block=["sku/9", "what", 3])
    assert (ids(result), result.unknown) == (["sku/2"], 0)
    assert (result.unknown_allow, result.unknown_block, result.nothing_allowed) == (1, 2, False)
    for allow, unknown in ((["typo"], 1), ([], 0)):
        for nothing in model.recommend([history, history], allow=allow):
            assert (nothing.items, nothing.unknown_allow, nothing.nothing_allowed) == ((), unknown, True)
    blocked = model.recommend(history, allow=["sku/2"], block=["sku/2"])
    assert (blocked.items, blocked.nothing_allowed) == ((), False)


@pytest.mark.parametrize("history", ["sku/3", ""])
def test_the_command_says_what_of_allow_and_block_is_unknown(
    exported: Export, history: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(exported()), "--history", history]
    assert main([*given, "--allow", "typo", "--block", "what,is this,sku/1"], "recommend") == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "ignored 1 of --allow that the model does not know",
        "ignored 2 of --block that the model does not know",
        "no known item in --allow: nothing can be recommended",
    ]
    assert main([*given, "--allow", "sku/2"], "recommend") == 0
    assert "--allow" not in capsys.readouterr().out


def test_without_a_known_item_the_popular_ones_are_recommended_and_flagged(model: Recommender) -> None:
    by_count = sorted(CATALOGUE, key=lambda item: -item.count)  # stable: ties by the lower id
    for history, unknown in (([], 0), (["what"], 1)):
        result = model.recommend(history, k=3)
        assert ids(result) == [item.original for item in by_count[:3]]
        assert (result.by_popularity, result.unknown) == (True, unknown)
    assert ids(model.recommend([], k=1, block=[by_count[0].original])) == [by_count[1].original]
    assert ids(model.recommend([], allow=["sku/2"])) == ["sku/2"]


def test_many_users_get_what_each_gets_alone(model: Recommender) -> None:
    rng = np.random.default_rng(0)
    histories = [[f"sku/{i}" for i in rng.integers(1, ITEMS + 1, rng.integers(0, 20))] for _ in range(70)]
    together = model.recommend(histories, k=5)
    assert [ids(one) for one in together] == [ids(model.recommend(history, k=5)) for history in histories]


def test_ids_may_be_numbers(exported: Export, tmp_path: Path) -> None:
    model = Recommender.load(exported())
    assert model.recommend([3, np.int64(1)]).unknown == 2
    assert model.recommend(np.array([3, 1])).unknown == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 4])
def test_ties_go_to_the_lower_internal_id(bits: int, exported: Export) -> None:
    model = Recommender.load(exported("ptq", bits, model={"hidden": 8}))
    state = model.encode(np.array([[3, 1, 4]]))
    scores = model.scores_of(state)[0, 1:]
    values, items = model.top_k(state, ITEMS, [np.zeros(0, np.int64)])
    assert items[0].tolist() == (np.argsort(-scores, kind="stable") + 1).tolist()
    assert (values[0] == scores[items[0] - 1]).all()


@pytest.mark.parametrize("k", [0, -1, 1.5, "3", None, True])
def test_k_must_be_a_whole_number_from_1_on(model: Recommender, k: object) -> None:
    with pytest.raises(ValueError, match="k must be"):
        model.recommend(HISTORY, k=k)  # type: ignore[arg-type]


@pytest.mark.parametrize("history", ["sku/3", None, 3, [1.5], [None], [["sku/1"], [True]], {"sku/1": 1}, [[["sku/1"]]]])
def test_other_histories_are_refused(model: Recommender, history: object) -> None:
    with pytest.raises(TypeError):
        model.recommend(history)  # type: ignore[arg-type]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_comes_in_the_answer_keeps_its_promises(model: Recommender, data: st.DataObject) -> None:
    known = st.integers(1, ITEMS).map(lambda i: f"sku/{i}")
    some = st.lists(known | st.text(max_size=4) | st.integers(), max_size=30)
    history, k = data.draw(some), data.draw(st.integers(1, 50))
    allow, block, exclude = data.draw(st.none() | some), data.draw(st.none() | some), data.draw(st.booleans())
    result = model.recommend(history, k, exclude, allow, block)
    found = ids(result)
    assert len(found) == len(set(found)) <= k
    assert not set(found) & set(map(str, block or []))
    assert allow is None or set(found) <= set(map(str, allow))
    assert not exclude or not set(found) & set(map(str, history))
    assert [item.score for item in result.items] == sorted((item.score for item in result.items), reverse=True)


def test_threads_share_a_model(model: Recommender) -> None:
    expected = [ids(model.recommend([f"sku/{i}"])) for i in range(1, 9)]
    found: dict[int, list[list[str]]] = {}

    def work(number: int) -> None:
        found[number] = [ids(model.recommend([f"sku/{i}"])) for _ in range(20) for i in range(1, 9)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result == expected * 20 for result in found.values())


BARE = """
import sys
forbidden = {"torch", "pandas", "pyarrow", "onnx", "safetensors", "scipy", "yaml", "dvc"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in forbidden:
            raise ImportError("forbidden: " + name)
sys.meta_path.insert(0, Refuse())
"""


def test_the_folder_works_alone(exported: Export, tmp_path: Path) -> None:
    """With numpy and onnxruntime only, from its own folder, and without this package."""
    folder = exported("lsq", 4)
    expected = ids(Recommender.load(folder).recommend(HISTORY))
    code = BARE + (
        "forbidden.add('sasrec')\nfrom recommender import Recommender\n"
        f"print(*[item.id for item in Recommender.load('.').recommend({HISTORY!r}).items])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected


def test_the_package_imports_nothing_heavy() -> None:
    code = BARE + "import sasrec\nassert not {'numpy', 'onnxruntime'} & set(sys.modules)\nimport sasrec.deploy"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_command_prints_a_table_or_json(exported: Export) -> None:
    folder = exported()
    expected = Recommender.load(folder).recommend(HISTORY, k=3)

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)

    arguments = ("--model", str(folder), "--history", "sku/3, sku/1,sku/4,x", "-k", "3")
    shown = run("-m", "sasrec", "recommend", *arguments).stdout.splitlines()
    assert [line.split()[1] for line in shown[1:4]] == ids(expected)
    assert expected.items[0].title in shown[1]
    assert "ignored 1" in shown[4]
    found = json.loads(run("-m", "sasrec", "recommend", *arguments, "--json").stdout)
    assert [item["id"] for item in found["items"]] == ids(expected)
    assert found["unknown"] == 1
    alone = run(str(folder / "recommender"), "--history", "sku/3,sku/1,sku/4", "-k", "3").stdout.splitlines()
    assert alone == shown[:4]
    wrong = run("-m", "sasrec", "recommend", "--model", "nowhere")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: nowhere/manifest.json cannot be read")
    assert run("-m", "sasrec", "recommend", *arguments[:4], "-k", "0").returncode == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("1193, 661 ,914", ["1193", "661", "914"]),
        (" , a b,,\n", ["a b"]),
        ("6\" nail,5'", ['6" nail', "5'"]),
        ('"a,b",c', ["a,b", "c"]),
        (' " i6 " , c', [" i6 ", "c"]),
        ('"""x""",""', ['"x"', ""]),
    ],
)
def test_options_name_ids_as_a_line_of_csv(text: str, expected: list[str]) -> None:
    assert listed("allow", text) == expected


@pytest.mark.parametrize("text", ['"a', 'b, "a', '"a"b,c', '"a""'])
def test_quotes_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--allow: the double quotes at \"a"):
        listed("allow", text)


def test_the_command_takes_ids_with_commas_and_outer_spaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = ["a", "b", "a,b", " i6", "i6"]
    items = [Item(original) for original in (*odd, *(str(i) for i in range(ITEMS - len(odd))))]
    export(tmp_path, build(), {}, items, {})
    model = Recommender.load(tmp_path)

    def run(*arguments: str) -> set[str]:
        assert main(["--model", str(tmp_path), "--json", "-k", str(ITEMS), *arguments], "recommend") == 0
        return {item["id"] for item in json.loads(capsys.readouterr().out)["items"]}

    assert run("--history", '"a,b"," i6"') == set(model.ids[1:]) - {"a,b", " i6"}
    assert run("--history", "a,b, i6") == set(model.ids[1:]) - {"a", "b", "i6"}
    assert run("--history", "7", "--allow", '"a,b", " i6", b') == {"a,b", " i6", "b"}
    assert run("--history", "7", "--allow", "a,b", "--block", '"a,b",b') == {"a"}
    assert main(["--model", str(tmp_path), "--block", '"a'], "recommend") == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: --block: the double quotes") and errors.count("\n") == 1
