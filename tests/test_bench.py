"""What the benchmark times: the plain code is the same network, everything takes turns, and nothing is measured by halves."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml

from sasrec import losses
from sasrec.adam import Adam
from sasrec.bench import alone, plain_data, settings, works
from sasrec.bench.plain import PlainSASRec, PlainTraining, full_ranks, refuse, sampled_ranks
from sasrec.bench.plain_data import Data, read
from sasrec.bench.rounds import Spread, in_turns, ratio
from sasrec.bench.settings import NAMED, PAPER, Setting, random_store, some_users
from sasrec.bench.works import Methods
from sasrec.config import ModelParams, QuantParams, TrainParams
from sasrec.data.batches import epoch_batches
from sasrec.data.sequences import Sequences
from sasrec.errors import UserError
from sasrec.evaluation import model_scorer, rank
from sasrec.models.sasrec import SASRec
from sasrec.report import speed
from stages import bench as command
from tests.conftest import ROOT, SmallStore

SHAPE = ModelParams(max_len=8, hidden=16, dropout=0.3)
key = itemgetter(*speed.KEY)
METHODS = Methods(("control", "ptq", "lsq", "dorefa"), QuantParams(bits=4), {})


def twins(params: ModelParams, items: int) -> tuple[SASRec, PlainSASRec]:
    """Both networks with the same random weights, of a size that makes every part of them count."""
    torch.manual_seed(0)
    model, plain = SASRec(params, items), PlainSASRec(params, items)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.dim() == 2 else 0.5))
        model.item_table.weight[0] = 0
    renamed = {
        name.replace("attention.", "").replace("feed_forward.", ""): tensor for name, tensor in model.state_dict().items()
    }
    plain.load_state_dict(renamed)
    return model.eval(), plain.eval()


@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("block", ["original", "pre_norm", "post_norm"])
def test_the_plain_network_is_the_same(block: Any, final_norm: bool) -> None:
    model, plain = twins(replace(SHAPE, block=block, ffn_dim=24, final_norm=final_norm), 30)
    histories = torch.randint(1, 31, (5, 8))
    for row, length in enumerate((8, 5, 1, 7, 2)):
        histories[row, : 8 - length] = 0
    real = histories > 0
    with torch.no_grad():
        own, other = model.encode(histories)[real], plain(histories)[real]
    assert own.std() > 0.1
    torch.testing.assert_close(other, own, atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", ["bce", "cross_entropy"])
def test_the_plain_loss_and_its_gradient_are_the_same(loss: Any) -> None:
    train = replace(PAPER, loss=loss)
    model, plain = twins(replace(SHAPE, block="original"), 30)
    training = PlainTraining(plain, Data([[1, 2, 3, 4]], 30), train, 2)
    inputs, targets, negatives = torch.randint(1, 31, (3, 4, 8))
    inputs[0, :3] = targets[0, :3] = negatives[0, :3] = 0
    real = targets > 0
    given = targets[real], negatives[real][:, None]
    result = losses.compute(train, 30, model.score, model.scoring_table.all, model.encode(inputs)[real], *given)
    own, other = result.loss, training.loss(inputs, targets, negatives)
    torch.testing.assert_close(other, own, atol=1e-5, rtol=0)
    own.backward()
    other.backward()
    torch.testing.assert_close(plain.item_table.weight.grad[1:], model.item_table.weight.grad[1:], atol=1e-5, rtol=1e-4)  # type: ignore[index]


def test_plain_ranks_are_the_same(chains: SmallStore) -> None:
    store: Any = SmallStore([*chains.sequences, [5, 6]], 40)  # and one who is not evaluated
    data = Data(store.sequences, 40)
    model, plain = twins(SHAPE, 40)
    expected = rank(model_scorer(model), store, "test", 8)
    assert np.array_equal(full_ranks(plain, data), expected.full)
    candidates = [[item for item in row if item] for row in store.negatives.tolist()]
    assert np.array_equal(sampled_ranks(plain, data, candidates), expected.sampled)
    assert np.array_equal(full_ranks(plain, data, held=2), rank(model_scorer(model), store, "validation", 8).full)


def test_plain_candidates_are_a_hundred_or_all_unseen_items() -> None:
    _, plain = twins(SHAPE, 40)
    few = sampled_ranks(plain, Data([[1, 2, 3], list(range(1, 41))], 40), count=100)
    assert few.shape == (2,) and 1 <= few[0] <= 38 and few[1] == 1


@pytest.mark.parametrize("every", ["last", "all"])
def test_plain_batches_hold_each_pair_once_and_unseen_negatives(every: Any) -> None:
    sequences = [list(range(1, 25)), [7, 9, 11, 13], [3, 4], [5]]
    train = replace(PAPER, windows=every)
    training = PlainTraining(PlainSASRec(SHAPE, 30), Data(sequences, 30), train, 2)
    found = [torch.cat(parts) for parts in zip(*training.batches(), strict=True)]
    inputs, targets, negatives = (part[found[1] > 0].tolist() for part in found)
    long = list(zip(range(1, 22), range(2, 23), strict=True))
    expected = [*(long if every == "all" else long[-8:]), (7, 9), (3, 4)]
    assert sorted(zip(inputs, targets, strict=True)) == sorted(expected)
    assert all(item > 22 for item, target in zip(negatives, targets, strict=True) if target not in (4, 9))
    # As many positions as an epoch of this project has.
    store: Any = SmallStore(sequences, 30)
    assert epoch_batches(store, 8, 2, every == "all", 0, 1).positions == len(expected)


def test_the_plain_code_learns(chains: SmallStore) -> None:
    torch.manual_seed(0)
    training = PlainTraining(PlainSASRec(SHAPE, 40), Data(chains.sequences, 40), replace(PAPER, lr=0.01), 16)
    first, _ = training.epoch()
    for _ in range(15):
        last, _ = training.epoch()
    assert last < 0.6 * first


def test_lines_become_lists(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("1 4\n0 2\n1 3\n1 4\n")
    assert read(path) == Data([[2], [4, 3, 4]], 4)
    assert read(path).training() == [[2], [4]]


def test_plain_preparing_counts_on_the_raw_data_and_numbers_by_first_sight(tmp_path: Path) -> None:
    raw, made = tmp_path / "raw.txt", tmp_path / "made.txt"
    raw.write_text("ann tea\nbob tea\nann jam\nbob ham\nann tea\ncy jam\n")
    plain_data.prepare(raw, 2, 2, made)
    assert made.read_text() == "1 1\n1 2\n1 1\n2 1\n"  # no ham, which occurs once, and no cy


def test_what_the_plain_code_lacks_is_refused() -> None:
    for setting in NAMED.values():
        refuse(setting.model, setting.train)
    with pytest.raises(UserError, match=r"model\.heads is 2, which the plain reference does not have; set it to 1"):
        refuse(ModelParams(heads=2), PAPER)
    with pytest.raises(UserError, match=r"but not gbce"):
        refuse(SHAPE, TrainParams(loss="gbce"))
    with pytest.raises(UserError, match=r"bce with train\.negatives: 1"):
        refuse(SHAPE, replace(PAPER, negatives=2))


def test_works_take_turns_forwards_and_backwards_and_the_first_round_does_not_count() -> None:
    called, now = [], [0.0, 0.0]

    def work(name: str, seconds: float, units: int | None) -> int | None:
        called.append(name)
        now[0] += seconds * len(called)
        now[1] += seconds
        return units

    lines: list[str] = []
    found = in_turns(
        {"a": lambda: work("a", 1, None), "b": lambda: work("b", 6, 3)}, 2,
        log=lines.append, wall=lambda: now[0], cpu=lambda: now[1],
    )  # fmt: skip
    assert "".join(called) == "baabba"  # the round that does not count, then two
    assert found["a"].wall == [3.0, 6.0] and found["a"].cpu == [1.0, 1.0]
    assert found["b"].wall == [8.0, 10.0] and found["b"].cpu == [2.0, 2.0]  # a step of three
    assert lines == ["round 1 of 2: a 3 s, b 8 s", "round 2 of 2: a 6 s, b 10 s"]


def test_ratios_are_taken_round_by_round() -> None:
    # A machine that slows down fourfold in the middle: medians of each alone say nothing, pairs do.
    assert ratio([1, 1, 4, 4], [2, 2, 8, 8]) == Spread(0.5, 0.5, 0.5, 4)
    assert Spread.of([4, 1, 2, 3, 5]) == Spread(3, 2, 4, 5)


def test_some_users_keep_their_sequences_and_what_is_held_out() -> None:
    store = random_store(50, 6, 40)
    some = some_users(store, 10)
    users = np.arange(10) * 4
    assert some.users == 10 and some.items_count == 50
    for number, user in enumerate(users):
        own = slice(*store.offsets[user : user + 2])
        assert np.array_equal(some.items[slice(*some.offsets[number : number + 2])], store.items[own])
    for part in ("test", "validation"):
        held, all_held = some.held(part), store.held(part)
        assert np.array_equal(some.items[held.positions], store.items[all_held.positions[users]])
    assert some._problem() is None
    assert some_users(store, 40) is store


def test_a_turn_of_steps_has_the_batches_of_the_whole_data() -> None:
    store = random_store(50, 8, 64 * 16)
    setting = Setting("tiny", SHAPE, replace(PAPER, batch_size=64))
    made = works.steps(store, setting, METHODS)
    assert list(made) == ["plain", "float32", "lsq", "dorefa"]  # neither what adds nothing nor what does not train
    assert {name: work() for name, work in made.items()} == dict.fromkeys(made, settings.STEPS)
    small = replace(setting, train=replace(PAPER, batch_size=64, min_batches=32))
    assert settings.batch_size(store, small) == 32  # as in training on all of it
    bfloat16 = replace(setting, train=replace(setting.train, precision="bfloat16"))
    assert list(works.steps(store, bfloat16, METHODS))[:3] == ["plain", "float32", "bfloat16"]


@pytest.mark.parametrize("windows", ["all", "last"])
def test_a_turn_of_steps_tells_how_many_it_took(windows: Literal["all", "last"], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain code and the other may cut different numbers of windows; a step's time is that of each one's own."""
    store = random_store(50, 6 * SHAPE.max_len - 1, 100)  # which no number of whole windows is
    setting = Setting("tiny", SHAPE, replace(PAPER, batch_size=4, windows=windows))
    taken: list[object] = []

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def count(*given: Any) -> Any:
            taken.append(given)
            return step(*given)

        return count

    for kind in (Adam, torch.optim.Adam):
        monkeypatch.setattr(kind, "step", counted(kind.step))
    for name, work in works.steps(store, setting, METHODS).items():
        for _ in range(3):
            taken.clear()
            assert work() == len(taken) > 0, name


def test_a_process_tells_its_own_peak_and_what_went_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    held = np.ones(50_000_000)  # 400 MB that only this process has
    lines = tmp_path / "lines.txt"
    lines.write_text("0 1\n0 2\n0 3\n")
    found = alone.run("prepare_plain", 1, lines=str(lines), prepare={"min_user": 1, "min_item": 1})
    assert 5 < found.peak < 300 < held.nbytes / 2**20 and found.cpu > 0 and found.wall > 0
    with pytest.raises(UserError, match=r"^evaluate in a process of its own: the prepared data in nowhere cannot be used"):
        alone.run("evaluate", 1, prepared="nowhere", model={}, train={})
    monkeypatch.setattr(alone, "STATUS", tmp_path / "none")
    with pytest.raises(UserError, match="measured on Linux only"):
        alone.peak_mb()


Run = Callable[..., str]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A folder with parameters of a tiny study, and what runs the command in it and returns what it printed."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"sample": {"users": 60, "items": 40, "seed": 0}, "quantized": ["control", "ptq", "lsq"], "variants": ["sasrec"]}
    params["model"] |= {"max_len": 10, "hidden": 8}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    for name in ("sasrec", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["bench", *arguments])
        command.main()
        return capsys.readouterr().out

    return run


def prepared() -> None:
    """The data of the tiny study, made by the stages themselves."""
    from stages import fetch, prepare
    from stages.common import read_study

    fetch.main(read_study())
    prepare.main(read_study())


def test_the_whole_command(project: Run) -> None:
    prepared()
    said = project("--rounds", "3")
    rows = speed.read(command.TABLE)
    assert len({key(row) for row in rows}) == len(rows)
    trained = ["plain", "float32", "bfloat16", "lsq"]
    beside = ["plain", "float32"]
    expected = {"step": trained, "epoch": trained, "evaluate both": beside, "evaluate full": beside, "prepare": beside}
    for what, variants in (expected | {"quantize": ["ptq"]}).items():
        for measure in ("wall", "cpu"):
            own = [row for row in rows if (row["what"], row["measure"]) == (what, measure)]
            assert [row["variant"] for row in own] == variants, what
            assert all(0 < float(row["q1"]) <= float(row["median"]) <= float(row["q3"]) for row in own)
            assert {row["rounds"] for row in own} == {"9" if what == "step" else "3"}
    peaks = {(row["what"], row["variant"]) for row in rows if row["measure"] == "peak"}
    assert peaks == {(f"{what}{rest}", v) for what, rest in (("prepare", ""), ("train", " process"), ("evaluate", " process"))
                     for v in beside}  # fmt: skip
    lsq = next(row for row in rows if (row["what"], row["variant"], row["measure"]) == ("step", "lsq", "cpu"))
    assert (
        float(lsq["of_plain"]) > 0
        and float(lsq["of_full"]) > 0
        and lsq["data"] == "sample"
        and lsq["users"] == str(Sequences.load("data/prepared").users)
    )
    assert "batch 5, cross_entropy, windows all" in lsq["shape"]  # not 128: an epoch of few windows has 50 batches, too
    assert "step, round 9 of 9: plain" in said and "prepare, round 3 of 3" in said
    assert command.TABLE.with_suffix(".png").stat().st_size < 1_000_000
    # Again in part: those rows are replaced, the others stay.
    before = {key(row): row for row in rows}
    project("--rounds", "4", "--what", "evaluate", "--methods")
    after = {key(row): row for row in speed.read(command.TABLE)}
    assert list(after) == list(before)
    assert {name for name, row in after.items() if row != before[name]} == {name for name in before if "evaluate " in name[3]
                                                                            and "process" not in name[3]}  # fmt: skip
    text = speed.speed(command.TABLE)
    assert "| `sample`, default | training step, bfloat16 products | " in text and "| `sample`, default | lsq | " in text


def test_a_made_up_catalogue_needs_no_data_and_has_steps_alone(project: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(NAMED["large"], model=replace(SHAPE, block="original"), random_items=50)
    monkeypatch.setitem(settings.NAMED, "large", replace(tiny, train=replace(PAPER, batch_size=4)))
    project("--setting", "large", "--rounds", "3")
    rows = speed.read(command.TABLE)
    assert {(row["what"], row["data"], row["items"]) for row in rows} == {("step", "random", "50")}
    assert [row["variant"] for row in rows if row["measure"] == "cpu"] == ["plain", "float32", "lsq"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"data/prepared has no prepared data; run `dvc repro prepare`"),
        (("--setting", "q"), r"the command line: unknown setting 'q'; known: default, large, p, s"),
        (("--what", "steps"), r"unknown thing to measure 'steps'; did you mean 'step'\?"),
        (("--methods", "lsp"), r"unknown method 'lsp'; did you mean 'lsq'\?"),
        (("--rounds", "2"), r"--rounds starts at 3"),
    ],
)
def test_refusals(project: Run, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        project(*arguments)
    assert not command.TABLE.exists()


def test_other_data_than_the_study_names_is_refused(project: Run) -> None:
    prepared()
    stats = Path("data/prepared/stats.json")
    content = json.loads(stats.read_text())
    stats.write_text(json.dumps(content | {"dataset": "ml-1m"}))
    with pytest.raises(SystemExit, match=r"holds 'ml-1m', but params.yaml names 'sample'; run `dvc repro prepare`"):
        project()
    stats.write_text(json.dumps(content | {"split": {"split": "temporal"}}))
    with pytest.raises(SystemExit, match=r"leave_one_out alone"):
        project()


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    with pytest.raises(UserError, match=r"python -m stages\.bench makes it"):
        speed.read(path)
    path.write_text("what,median\nstep,1\n")
    with pytest.raises(UserError, match="has other columns"):
        speed.read(path)
