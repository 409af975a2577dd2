"""What the sweep reads from DVC, on output recorded from DVC 3.67.1. Running it for real is the pipeline's test."""

import json
from pathlib import Path

import pytest

from sasrec.config import DatasetParams, Study
from sasrec.errors import UserError
from stages import tune

NAMES = ["canny-torc", "veiny-kegs", "tidal-army", "ample-doxy", "sewed-chad", "unwed-rods"]
KEYS = ["train.lr", "model.dropout"]
# Two of the six failed; DVC shows them with the metrics of the commit they started from.
SHOWN = json.loads((Path(__file__).parent / "exp_show.json").read_text())

QUEUED = """\
Queueing with overrides '{'params.yaml': ['train.lr=0.0005']}'.
Queued experiment 'canny-torc' for future execution.
Queueing with overrides '{'params.yaml': ['train.lr=0.002']}'.
Queued experiment 'veiny-kegs' for future execution.
"""

STATUS = """\
Task     Name        Created       Status
a7eeba3  tidal-army  06:57 AM      Running
819e762  ample-doxy  Nov 21, 2026  Queued
9ddf577  sewed-chad  06:57 AM      Failed
3f17796  canny-torc  06:57 AM      Success

Worker status: 1 active, 2 idle
"""

TABLE = """\
experiment  train.lr  model.dropout  sasrec valid_ndcg@10
ample-doxy  0.002     0.3            0.20300 *
tidal-army  0.002     0.2            0.20200
veiny-kegs  0.0005    0.3            0.18800
canny-torc  0.0005    0.2            0.18700
sewed-chad  0.5       0.2            failed
unwed-rods  0.5       0.3            failed
"""


def test_names_of_queued_experiments() -> None:
    assert tune.queued_names(QUEUED) == ["canny-torc", "veiny-kegs"]


def test_states_of_the_queue() -> None:
    assert tune.states(STATUS) == (
        {"tidal-army": "Running", "ample-doxy": "Queued", "sewed-chad": "Failed", "canny-torc": "Success"},
        3,
    )
    assert tune.states("No experiment tasks in the queue.\n\nWorker status: 0 active, 0 idle\n") == ({}, 0)


def test_ranked_by_validation_and_the_failed_last() -> None:
    ranked = tune.trials(SHOWN, NAMES, KEYS, ["sasrec"])
    assert tune.table(ranked, KEYS, ["sasrec"]) == TABLE
    assert [trial.scores for trial in ranked[-2:]] == [(None,), (None,)]


def test_other_experiments_and_lost_ones() -> None:
    ranked = tune.trials(SHOWN, ["veiny-kegs", "never-seen"], ["train.lr", "quant.bits"], ["sasrec"])
    assert ranked == [
        tune.Trial("veiny-kegs", (0.0005, None), (0.188,)),
        tune.Trial("never-seen", (None, None), (None,), "lost"),
    ]


def test_a_key_may_be_added_and_jobs_are_one_or_more() -> None:
    assert tune.keys(["+quant.overrides.final=4,8", "train.lr=1e-3"]) == ["quant.overrides.final", "train.lr"]
    with pytest.raises(UserError, match="--jobs must be 1 or more, not 0"):
        tune.main(Study(models=("sasrec",), quantized=(), variants=("sasrec",), seeds=(0,)), "--jobs", "0")


def test_a_target_without_metrics_has_no_result() -> None:
    (trial,) = tune.trials(SHOWN, ["veiny-kegs"], [], ["lsq"])
    assert (trial.scores, trial.failure) == ((None,), "no result")


TWO = [
    {
        "experiments": [
            {"name": name, "revs": [{"data": {
                "params": {"params.yaml": {"data": {"quant": {"lr": lr}}}},
                "metrics": {f"metrics/{method}.json": {"data": {"valid_ndcg@10": score}} for method, score in scores.items()},
            }}], "executor": {"state": state}}
            for name, lr, scores, state in (
                ("slow-one", 0.0002, {"lsq": 0.3, "ste": 0.29}, "success"),
                ("fast-one", 0.002, {"lsq": 0.31, "ste": 0.28}, "success"),
                ("lost-one", 0.5, {"lsq": 0.4, "ste": 0.4}, "failed"),
                ("half-one", 0.01, {"lsq": 0.2}, "success"),
            )
        ]
    }
]  # fmt: skip

SEVERAL = """\
experiment  quant.lr  ste valid_ndcg@10  lsq valid_ndcg@10
slow-one    0.0002    0.29000 *          0.30000
fast-one    0.002     0.28000            0.31000 *
lost-one    0.5       failed             failed
half-one    0.01      no result          0.20000
"""


def test_of_several_targets_each_has_a_best_among_as_many_trials() -> None:
    ranked = tune.trials(TWO, ["lost-one", "half-one", "slow-one", "fast-one"], ["quant.lr"], ["ste", "lsq"])
    assert tune.table(ranked, ["quant.lr"], ["ste", "lsq"]) == SEVERAL
    assert tune.chosen(ranked, ["ste", "lsq"]) == [
        "best of ste on validation: dvc exp apply slow-one", "best of lsq on validation: dvc exp apply fast-one",
    ]  # fmt: skip
    lost, half = ranked[2:]
    assert tune.chosen([lost, half], ["ste", "lsq"])[0] == "ste came to no result"
    with pytest.raises(UserError, match="no experiment came to a result"):
        tune.chosen([lost], ["ste", "lsq"])


def test_test_metrics_are_never_shown() -> None:
    assert "0.9" not in tune.table(tune.trials(SHOWN, NAMES, KEYS, ["sasrec"]), KEYS, ["sasrec"])


def test_the_reason_is_the_stage_s_own_error() -> None:
    log = "Running stage\nerror: training diverged\nERROR: failed to reproduce: exited with 1\n\n"
    assert tune.reason(log) == "error: training diverged"
    assert tune.reason("ERROR: exited with -9\n") == "ERROR: exited with -9"
    assert tune.reason("") == "no log"


def test_keys_of_a_grid() -> None:
    assert tune.keys(["train.lr=5e-4,1e-3", "model.dropout=0.2"]) == ["train.lr", "model.dropout"]
    with pytest.raises(UserError, match="-S 'train.lr' is not of the form KEY=A,B"):
        tune.keys(["train.lr"])


def study(path: str = "data/.gitkeep") -> Study:
    return Study(("sasrec",), (), ("sasrec",), (0,), dataset=DatasetParams(path=path))


def test_a_relative_path_of_the_data_is_refused() -> None:
    with pytest.raises(UserError, match="experiments of the queue run in another folder; make it absolute: /"):
        tune.main(study("../mine.csv"))


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UserError, match="unknown variant 'sasrek'; did you mean 'sasrec'"):
        tune.main(study(), "--target", "sasrec", "sasrek")


def test_a_queue_in_use_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "dvc", lambda *arguments: STATUS)
    with pytest.raises(UserError, match=r"other experiments \(tidal-army, ample-doxy\)"):
        tune.main(study())


def answer(calls: list[tuple[str, ...]], status: list[str]) -> "object":
    """A dvc that answers as the recorded one did, and notes what it was asked."""

    def dvc(*arguments: str) -> str:
        calls.append(arguments)
        if arguments[:2] == ("queue", "status"):
            return status.pop(0)
        if arguments[:2] == ("exp", "run"):
            return QUEUED
        return json.dumps(SHOWN) if arguments[:2] == ("exp", "show") else ""

    return dvc


DONE = "3f17796  canny-torc  06:57 AM  Success\na79e8d3  veiny-kegs  06:57 AM  Success\n"
BEGUN = "3f17796  canny-torc  06:57 AM  Success\na79e8d3  veiny-kegs  06:57 AM  Running\n"


def test_a_sweep_from_queue_to_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(tune, "dvc", answer(calls, ["", BEGUN, DONE]))
    monkeypatch.setattr(tune, "POLL", 0)
    tune.main(study(), "-S", "train.lr=5e-4,2e-3")
    assert ("exp", "run", "--queue", "-S", "train.lr=5e-4,2e-3", "evaluate@sasrec") in calls
    assert calls[-1] == ("queue", "remove", "canny-torc", "veiny-kegs")
    assert capsys.readouterr().out.endswith("best of sasrec on validation: dvc exp apply veiny-kegs\n")


def test_workers_that_stop_are_started_again_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(tune, "dvc", answer(calls, ["", *[BEGUN] * 20]))
    monkeypatch.setattr(tune, "POLL", 0)
    with pytest.raises(UserError, match="keep stopping"):
        tune.main(study())
    assert calls.count(("queue", "start", "--jobs", "1")) == 1 + tune.RESTARTS
    assert calls[-2:] == [("queue", "stop", "--kill"), ("queue", "remove", "canny-torc", "veiny-kegs")]


def test_an_interrupted_sweep_leaves_no_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def interrupt(names: object, jobs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "dvc", answer(calls, [""]))
    monkeypatch.setattr(tune, "wait", interrupt)
    with pytest.raises(UserError, match="interrupted"):
        tune.main(study())
    assert calls[-2:] == [("queue", "stop", "--kill"), ("queue", "remove", "canny-torc", "veiny-kegs")]
