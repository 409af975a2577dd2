"""What does not suit a method ends before anything is trained, and what suits does not."""

from pathlib import Path
from typing import Any

import pytest

from sasrec import checkpoint
from sasrec.config import Study
from sasrec.data.sequences import Sequences
from sasrec.errors import UserError
from sasrec.mapping import from_mapping
from stages import fetch, methods, prepare, train


def study(*quantized: str, **sections: Any) -> Study:
    base = {
        "models": ["sasrec"],
        "quantized": quantized,
        "variants": ["sasrec"],
        "seeds": [0],
        "dataset": {"name": "file", "path": "mine.csv"},
        "prepare": {"min_user": 1, "min_item": 1, "candidates": 2},
        "per_model": {"sasrec": {}},
    }
    return from_mapping(Study, {**base, **sections}, "")


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.csv").write_text("user,item\n" + "".join(f"u{u},i{(u + i) % 6}\n" for u in range(4) for i in range(4)))
    fetch.main(study())
    prepare.main(study())


SAWB: dict[str, Any] = {"pact": {"weights": "sawb"}}


@pytest.mark.parametrize(
    ("quantized", "sections", "why"),
    [
        (["lsq"], {"methods": {"lsq": {"lrr": 0.1}}}, "methods.lsq.lrr.*did you mean.*methods.lsq.lr"),
        (["lsq"], {"methods": {"apot": {"lrr": 0.1}}}, "methods.apot.lrr"),  # which is in no list
        (["pact"], {"methods": SAWB, "quant": {"bits": 3}}, "sawb is published for 2, 4 and 8 bits, and item_table.* has 3"),
        (["pact"], {"methods": SAWB, "quant": {"bits": 4, "progressive": [6]}}, "sawb is published .*, and item_table.* has 6"),
        (["pact"], {"methods": SAWB, "quant": {"budget_kb": 60}}, "sawb is published .*, and quant.budget_kb chooses from"),
        (["pq"], {"methods": {"pq": {"splits": 7}}}, "methods.pq.splits: 7 does not divide the 64 features"),
        (["ptq", "lsq"], {"quant": {"delay_epochs": 5}}, "5 epochs are too few for quant.delay_epochs: 5"),
        (["adaround"], {"methods": {"adaround": {"after": "lsq"}}, "quant": {"delay_epochs": 5}}, "5 epochs are too few"),
        (["adaround"], {"methods": {"adaround": {"after_options": {"lrr": 1}}}}, "no method in after"),
        (["lsq"], {"quant": {"init": "scratch", "delay_epochs": 9}, "train": {"epochs": 8}}, "raise train.epochs"),
        (["lsq"], {"quant": {"preset": "source", "delay_epochs": 20}}, "20 epochs are too few .* source has 20, so delay less"),
        (["lsq"], {"quant": {"budget_kb": 1}}, "quant.budget_kb: 1 kB do not hold .* the least is"),
        (["lsq", "ste", "pact"], {"methods": {"lsq": {"lrr": 1}, "pact": {"lrr": 1}}}, "methods.lsq.lrr.*; .*methods.pact.lrr"),
    ],
)  # fmt: skip
def test_what_does_not_suit(quantized: list[str], sections: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        train.main(study(*quantized, **sections), "sasrec", "0")
    assert not Path("data/models").exists()


def test_a_training_of_other_data_is_another_and_one_of_other_methods_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """`key` is what a killed training is known by, so that only the same one goes on with what it left."""
    order: list[str] = []

    pairs = [(u, i, (u + i) % 6) for u in range(4) for i in range(4)]
    rows = [f"u{u},i{item},{'ab'[item % 2]},{'cd'[item // 3]},{10**9 + i},{10**9 + i * i}\n" for u, i, item in pairs]
    Path("mine.csv").write_text("user,item,kind,brand,time,later\n" + "".join(rows))

    def key(category: str = "kind", timestamp: str = "time", quantized: str = "ptq") -> str:
        columns = {"category": category, "timestamp": timestamp}
        own = study(quantized, dataset={"name": "file", "path": "mine.csv", "columns": columns})
        fetch.main(own)
        prepare.main(own)
        found: list[str] = []

        def fingerprint(*parts: Any) -> str:
            order.append("key")
            found.append(checkpoint.fingerprint(*parts))
            raise KeyboardInterrupt

        monkeypatch.setattr(train, "fingerprint", fingerprint)
        monkeypatch.setattr(methods, "check", lambda *_: order.append("check"))
        with pytest.raises(KeyboardInterrupt):
            train.main(own, "sasrec", "0")
        return found[0]

    usual, stats = key(), Path("data/prepared/stats.json").read_bytes()
    assert key() == usual == key(quantized="lsq")
    for other in ({"category": "brand"}, {"timestamp": "later"}):  # the latter in the same order
        assert key(**other) != usual
        assert Path("data/prepared/stats.json").read_bytes() == stats  # which do not tell
    assert set(order) == {"key"}  # before any method is loaded


@pytest.mark.parametrize(
    ("quantized", "sections"),
    [
        (["lsq"], {"quant": {"bits": 4, "delay_epochs": 2, "progressive": [8, 6]}, "methods": SAWB}),
        (["ptq", "pact", "adaround", "control", "fp16"], {"quant": {"bits": 2}, "methods": SAWB}),
        (["ptq", "fp16"], {"quant": {"delay_epochs": 9}}),  # which have no epochs to share out
        (["lsq"], {"quant": {"budget_kb": 60}}),
        (["lsq", "adaround"], {"quant": {"preset": "source", "epochs": 1, "delay_epochs": 3},
                               "methods": {"adaround": {"after": "lsq"}}}),  # of its twenty epochs
    ],
)  # fmt: skip
def test_what_suits(quantized: list[str], sections: dict[str, Any]) -> None:
    methods.check(study(*quantized, **sections), Sequences.load(Path("data/prepared")), [[]] * 6)
