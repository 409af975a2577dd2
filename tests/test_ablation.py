"""python -m stages.ablation: what it measures, keeps and refuses."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sasrec.config import QuantParams, Study
from sasrec.data.sequences import Sequences
from sasrec.errors import UserError
from sasrec.measurements import read_rows
from sasrec.process import run_once
from stages import ablation as command
from stages.common import read_study
from stages.quantize import Plan
from tests.conftest import ROOT

STUDY = Study(
    ("sasrec",), ("lsq",), ("sasrec",), (0,), quant=QuantParams(bits=4, epochs=2), methods={"lsq": {"lr": 0.003}, "control": {}}
)


def test_a_change_is_of_one_key() -> None:
    table = command.changed(STUDY, "quant.table=per_tensor", "lsq")
    assert table == dataclasses.replace(STUDY, quant=QuantParams(bits=4, epochs=2, table="per_tensor"))
    assert command.changed(STUDY, "quant.progressive=[8,6]", "lsq").quant.progressive == (8, 6)
    offset = command.changed(STUDY, "methods.lsq.offset=true", "lsq")
    assert offset.methods == {"lsq": {"lr": 0.003, "offset": True}, "control": {}} and offset.quant == STUDY.quant
    assert command.changed(STUDY, "methods.ste.range=minmax", "ste").methods["ste"] == {"range": "minmax"}


@pytest.mark.parametrize(
    "choice", ["quant.table", "train.lr=1", "quant=1", "methods.ste.range=mse", "methods.lsq=1", "quant.a.b=1"]
)
def test_what_is_no_change_of_the_recipe_is_refused(choice: str) -> None:
    with pytest.raises(UserError, match=r"is not a change of the recipe; write quant\.KEY=VALUE or methods\.lsq\.KEY=VALUE"):
        command.changed(STUDY, choice, "lsq")


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", ["lsq", "ste"])
def test_every_choice_that_is_made_without_any_can_be_run(bits: int, method: str) -> None:
    study = dataclasses.replace(STUDY, quant=dataclasses.replace(STUDY.quant, bits=bits))
    found = command.choices(study, method)
    for choice in found:
        command.changed(study, choice, method)
    assert ("quant.progressive=[8]" in found, "methods.lsq.lr=0.03" in found) == (bits == 4, method == "lsq")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Study]]:
    """A project whose trainings give made-up users; what was asked to be trained."""
    content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    content["quant"] |= {"bits": 4, "epochs": 2}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (tmp_path / "metrics/reference").mkdir(parents=True)
    (tmp_path / "sasrec").symlink_to(Path("sasrec").absolute())
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[str, Study]] = []

    def measure(study: Study, method: str, seed: int) -> command.Measured:
        asked.append((method, study))
        # Everyone gains 1 % by scales per row, and loses 10 % by quantization.
        level = 0.5 if method == "control" else 0.45
        return command.Measured(4 * level, level, np.full(50, level * (1 if study.quant.table == "per_row" else 0.99)))

    monkeypatch.setattr(command, "measure", measure)
    monkeypatch.setattr(command, "planned_of", lambda *_: None)
    return asked


def test_what_no_plan_can_be_made_of_is_refused_before_anything_is_trained(
    project: list[tuple[str, Study]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned_of(study: Study, method: str, seed: int) -> None:
        if study.quant.model == "gsasrec":
            raise UserError("no gsasrec")

    monkeypatch.setattr(command, "planned_of", planned_of)
    for wrong, said in (("quant.bits=[", "quant.bits="), ("quant.model=gsasrec", "no gsasrec")):
        with pytest.raises(UserError, match=said):
            command.measure_all("lsq", 0, ["quant.table=per_tensor", wrong])
    with pytest.raises(UserError, match="unknown method 'nope'"):
        command.measure_all("nope", 0, ["quant.bits=4"])
    assert project == []


def test_a_plan_needs_the_trained_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="data/models/sasrec/7 does not exist; make it first: dvc repro train@sasrec-7"):
        command.planned_of(STUDY, "lsq", 7)


def test_each_choice_beside_the_recipe_and_the_control_of_its_own(project: list[tuple[str, Study]]) -> None:
    command.measure_all("lsq", 0, ["quant.table=per_tensor", "quant.distill=0.5"])
    plain, table, distilled = read_rows(command.TABLE, command.COLUMNS)
    assert [row["choice"] for row in (plain, table, distilled)] == ["the recipe", "quant.table=per_tensor", "quant.distill=0.5"]
    assert {(row["bits"], row["epochs"], row["lr"]) for row in (plain, table, distilled)} == {("4", "2", "0.0005")}
    assert plain["validation_loss"] == "1.8000" and plain["validation_ndcg@10"] == "0.4500"
    assert plain["of_recipe_%"] == "" and plain["of_control_%"] == "-10.00"
    assert table["of_recipe_%"] == table["of_recipe_low_%"] == "-1.00"
    assert distilled["of_recipe_%"] == "+0.00"
    controls = [study.quant for method, study in project if method == "control"]
    assert [quant.distill for quant in controls] == [0, 0, 0.5]
    assert {quant.table for quant in controls} == {"per_row"}  # of scales a control does not depend


def test_the_control_has_the_rate_that_the_width_of_a_choice_asks_for(project: list[tuple[str, Study]]) -> None:
    command.measure_all("lsq", 0, ["quant.embedding_bits=2"])
    assert [study.quant.lr for method, study in project if method == "control"] == [0.0005, 0.004]


def test_rows_measured_anew_are_replaced(project: list[tuple[str, Study]], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["ablation", "quant.table=per_tensor"])
        command.main()
    assert len(read_rows(command.TABLE, command.COLUMNS)) == 2
    command.measure_all("lsq", 1, [])
    assert len(read_rows(command.TABLE, command.COLUMNS)) == 3


def test_rows_of_another_data_set_stand_beside(project: list[tuple[str, Study]]) -> None:
    command.measure_all("lsq", 0, [])
    content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    content["dataset"] |= {"name": "sasrec", "path": "elsewhere/Video.txt"}
    Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    command.measure_all("lsq", 0, [])
    assert [row["data"] for row in read_rows(command.TABLE, command.COLUMNS)] == ["sample", "sasrec Video.txt"]


def test_a_wrong_choice_is_refused_before_anything_is_trained(project: list[tuple[str, Study]]) -> None:
    for wrong, said in (("quant.tabel=per_row", "table"), ("methods.lsq.steps=3", "steps"), ("quant.table=per_cow", "per_row")):
        with pytest.raises(UserError, match=said):
            command.measure_all("lsq", 0, ["quant.table=per_tensor", wrong])
    assert not project


def test_without_a_trained_model_it_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="dvc repro train@sasrec-3"):
        command.measure(STUDY, "lsq", 3)


def test_a_real_training_is_measured_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import fetch, prepare, train

    content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    content |= {"sample": {"users": 60, "items": 40, "seed": 0}, "threads": 1}
    content["model"] |= {"max_len": 10, "hidden": 8}
    content["train"] |= {"epochs": 2}
    content["quant"] |= {"bits": 4, "epochs": 1}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    for name in ("sasrec", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    study = read_study()
    fetch.main(study)
    prepare.main(study)
    train.main(study, "sasrec", "0")
    with run_once("again") as job:
        outcome = command.planned_of(study, "lsq", 0).run(job)
    best = next(row for row in outcome.rows if row.epoch == outcome.best_epoch)
    found = command.measure(study, "lsq", 0)
    assert found.loss == pytest.approx(best.validation_loss, abs=1e-4) and found.validation == round(best.validation_ndcg, 5)
    assert found.gains.shape == (Sequences.load("data/prepared").users,) and 0 < found.gains.mean() < 1
    monkeypatch.setattr(Plan, "run", None)  # what was kept needs no training
    again = command.measure(study, "lsq", 0)
    assert (again.loss, again.validation) == (found.loss, found.validation) and (again.gains == found.gains).all()


def test_rows_of_other_epochs_or_rates_stand_beside(project: list[tuple[str, Study]]) -> None:
    content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    for epochs, lr in ((2, None), (40, 0.002), (2, 0.0005)):  # the last is what the first stands for
        content["quant"] |= {"epochs": epochs, "lr": lr}
        Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        command.measure_all("lsq", 0, [])
    rows = read_rows(command.TABLE, command.COLUMNS)
    assert [(row["epochs"], row["lr"]) for row in rows] == [("2", "0.0005"), ("40", "0.002")]


def test_rows_of_another_recipe_stand_beside_and_say_what_is_other(project: list[tuple[str, Study]]) -> None:
    content = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    other: dict[str, dict[str, Any]] = {"quant": {"distill": 0.5, "progressive": [6]}, "methods": {"lsq": {"offset": True}}}
    for changes in ({}, other, other):
        content["quant"] |= changes.get("quant", {})
        content["methods"]["lsq"] |= changes.get("methods", {}).get("lsq", {})
        Path("params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        command.measure_all("lsq", 0, [])
    rows = read_rows(command.TABLE, command.COLUMNS)
    assert [row["recipe"] for row in rows] == ["", "quant.distill=0.5 quant.progressive=[6] methods.lsq.offset=true"]
