import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sasrec.config import BenchmarkParams, EvaluateParams, ModelParams, PrepareParams, QuantParams, Study, TrainParams
from sasrec.errors import UserError
from sasrec.mapping import from_mapping
from sasrec.quant.attach import load_method
from stages.common import Declared, read_study
from tests.conftest import ROOT


@pytest.mark.parametrize("text", ["5e-05", "0.00005", "5.0e-5", " 5e-05 "])
def test_a_rate_that_dvc_rewrote_is_still_a_number(text: str) -> None:
    # `dvc exp run -S train.lr=5e-5` writes 5e-05, which YAML 1.1 reads as text.
    assert from_mapping(TrainParams, yaml.safe_load(f"lr: {text}"), "train").lr == 5e-5
    assert from_mapping(TrainParams, {"lr": text}, "train").lr == 5e-5


@given(st.floats(min_value=1e-30, max_value=1e30))
def test_any_rate_survives_as_text(value: float) -> None:
    assert from_mapping(TrainParams, {"lr": repr(value)}, "train").lr == value


@pytest.mark.parametrize(
    ("cls", "section", "values", "message"),
    [
        (TrainParams, "train", {"lrr": 1}, "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        (TrainParams, "train", {"loss": "bcee"}, "unknown value of train.loss 'bcee'; did you mean 'bce'?"),
        (TrainParams, "train", {"lr": "fast"}, "train.lr must be a number, not 'fast'"),
        (TrainParams, "train", {"lr": float("nan")}, "train.lr must be a number"),
        (TrainParams, "train", {"lr": 0}, "train.lr must be above 0, not 0"),
        (TrainParams, "train", {"epochs": 2.5}, "train.epochs must be a whole number, not 2.5"),
        (TrainParams, "train", {"epochs": True}, "train.epochs must be a whole number"),
        (TrainParams, "train", {"shared_negatives": "perhaps"}, "train.shared_negatives must be true or false"),
        (TrainParams, "train", [1], "train must be a mapping"),
        (TrainParams, "train", {"negative_sampling": "popular"}, "did you mean 'popularity'?"),
        (
            TrainParams,
            "train",
            {"negative_sampling": "popularity", "loss": "bce"},
            "train.negative_sampling is popularity, which loss: bce cannot correct for; set negative_sampling: uniform",
        ),
        (ModelParams, "model", {"heads": 3}, "model.hidden (64) must be a multiple of heads (3)"),
        (ModelParams, "model", {"block": False}, "model.block must be one of"),
        (ModelParams, "model", {"position": True}, "model.position must be one of right, left, none, not true"),
        (ModelParams, "model", {"position": False}, "model.position must be one of right, left, none, not false"),
        (ModelParams, "model", {"position": None}, "model.position must be one of right, left, none, not null"),
        (ModelParams, "model", {"position": "true"}, "unknown value of model.position 'true'; known: left, none, right"),
        (ModelParams, "model", {"position": 1}, "model.position must be one of right, left, none, not 1"),
        (ModelParams, "model", {"side": ["ratng"]}, "unknown value of model.side[0] 'ratng'; did you mean 'rating'?"),
        (ModelParams, "model", {"side": ["rating", "rating"]}, "model.side names one twice: rating, rating"),
        (ModelParams, "model", {"side": "rating"}, "model.side must be a list, not 'rating'"),
        (TrainParams, "train", {"rating_weight": -1}, "train.rating_weight must be at least 0, not -1"),
        (ModelParams, "model", {"dropout": 1}, "model.dropout must be between 0 and 0.95, not 1"),
        (QuantParams, "quant", {"bits": 9}, "quant.bits must be between 2 and 8, not 9"),
        (QuantParams, "quant", {"lr": 0}, "quant.lr must be above 0 or empty, not 0"),
        (QuantParams, "quant", {"lr": "fast"}, "quant.lr must be a number"),
        (QuantParams, "quant", {"weight_bits": 1}, "quant.weight_bits must be between 2 and 8, not 1"),
        (QuantParams, "quant", {"activation_bits": 16}, "quant.activation_bits must be between 2 and 8, not 16"),
        (QuantParams, "quant", {"embedding_bits": 0}, "quant.embedding_bits must be between 1 and 8, not 0"),
        (QuantParams, "quant", {"preset": "papers"}, "did you mean 'paper'?"),
        (QuantParams, "quant", {"dropout": 1.0}, "quant.dropout must be between 0 and 0.95, not 1.0"),
        (QuantParams, "quant", {"distill": 1.5}, "quant.distill must be between 0 and 1, not 1.5"),
        (QuantParams, "quant", {"delay_epochs": -1}, "quant.delay_epochs must be at least 0, not -1"),
        (QuantParams, "quant", {"progressive": [4, 8]}, "quant.progressive must fall from width to width, not 4, 8"),
        (QuantParams, "quant", {"progressive": [16]}, "quant.progressive must be between 2 and 8, not 16"),
        (QuantParams, "quant", {"budget_kb": 9, "max_drop": 0.1}, "quant.budget_kb and max_drop are both given"),
        (QuantParams, "quant", {"budget_kb": 0}, "quant.budget_kb must be above 0, not 0"),
        (QuantParams, "quant", {"budget_kb": 9, "init": "scratch"}, "quant.budget_kb is found out on a trained model"),
        (QuantParams, "quant", {"max_drop": 0.1, "preset": "source"}, "quant.max_drop is found out on a trained model"),
        (QuantParams, "quant", {"init": "control", "preset": "source"}, "quant.init: control does not go with preset: source"),
        (QuantParams, "quant", {"distill": 0.5, "epochs": 0}, "quant.distill is of the training, and epochs is 0"),
        (QuantParams, "quant", {"bits": 8, "progressive": [4]}, "ends at 4 bits, and no tensor has fewer than 8; name wider"),
        (QuantParams, "quant", {"bits": 4, "weight_bits": 8, "progressive": [8, 4]}, "no tensor has fewer than 4"),
        (QuantParams, "quant", {"budget_kb": 9, "embedding_bits": 2}, "budget_kb chooses the widths that embedding_bits gives"),
        (QuantParams, "quant", {"max_drop": 0.1, "weight_bits": 4}, "max_drop chooses the widths that weight_bits gives"),
        (QuantParams, "quant", {"delay_epochs": 1, "epochs": 0}, "quant.delay_epochs is of the training, and epochs is 0"),
        (
            QuantParams,
            "quant",
            {"bits": 2, "progressive": [4], "epochs": 0},
            "quant.progressive is of the training, and epochs is 0",
        ),
        (QuantParams, "quant", {"overrides": {"item_table.weight": 12}}, "quant.overrides.item_table.weight must be"),
        (QuantParams, "quant", {"overrides": {"item_table": {}}}, "quant.overrides.item_table must be a whole number"),
        (PrepareParams, "prepare", {"filter": "kcore"}, "did you mean 'k_core'?"),
        (EvaluateParams, "evaluate", {"recent_days": 0}, "evaluate.recent_days must be above 0 and at most 36525, not 0"),
        (EvaluateParams, "evaluate", {"recent_days": 40_000}, "evaluate.recent_days must be above 0 and at most 36525"),
        (EvaluateParams, "evaluate", {"knn_neighbours": 0}, "evaluate.knn_neighbours must be"),
        (EvaluateParams, "evaluate", {"knn_last": 0}, "evaluate.knn_last must be"),
        (PrepareParams, "prepare", {"split": "temporl"}, "did you mean 'temporal'?"),
        (PrepareParams, "prepare", {"test_share": 0}, "prepare.test_share must be between 0.001 and 0.9, not 0"),
        (
            PrepareParams,
            "prepare",
            {"test_share": 0.6, "validation_share": 0.5},
            "prepare.test_share and validation_share are 1.1",
        ),
        (BenchmarkParams, "benchmark", {"batch_sizes": [1, "x"]}, "benchmark.batch_sizes[1] must be a whole number"),
    ],
)
def test_bad_values_name_the_key(cls: type, section: str, values: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        from_mapping(cls, values, section)
    assert str(caught.value).startswith("params.yaml: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("word", ["right", "left", "none"])
def test_the_kinds_of_position_are_words_in_yaml(word: str) -> None:
    # Unlike null, none is a word to YAML.
    assert from_mapping(ModelParams, yaml.safe_load(f"position: {word}"), "model").position == word


def test_embeddings_may_have_one_bit() -> None:
    assert from_mapping(QuantParams, {"embedding_bits": 1, "overrides": {"a": 32, "b": "1"}}, "quant").embedding_bits == 1


def test_overrides_that_dvc_nested_are_flat_again() -> None:
    # `-S +quant.overrides.item_table.weight=4` writes a mapping in a mapping.
    params = from_mapping(QuantParams, {"overrides": {"item_table": {"weight": 4}, "final": 8}}, "quant")
    assert params.overrides == {"item_table.weight": 4, "final": 8}


def write(tmp_path: Path, **changes: Any) -> Path:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({**params, **changes}))
    return path


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + "seeds: [1]\n")
    with pytest.raises(UserError, match="the key seeds stands there twice"):
        read_study(path)
    path.write_bytes("models: [é]".encode("latin-1"))
    with pytest.raises(UserError, match="is not a text file in UTF-8"):
        read_study(path)
    with pytest.raises(UserError, match="is not a text file in UTF-8"):
        read_study(tmp_path)


def test_a_mapping_may_take_in_another(tmp_path: Path) -> None:
    """By YAML's merge key: what stands beside it wins, and still has to stand once."""
    path = write(tmp_path, sample={"items": 500, "seed": 7})
    path.write_text(path.read_text().replace("sample:\n", "sample:\n  <<: {users: 30, seed: 4}\n", 1))
    found = read_study(path).sample
    assert (found.users, found.items, found.seed) == (30, 500, 7)
    path.write_text(path.read_text().replace("  seed: 7\n", "  seed: 7\n  seed: 8\n", 1))
    with pytest.raises(UserError, match="the key seed stands there twice"):
        read_study(path)


def test_large_whole_numbers_are_taken_as_they_are() -> None:
    assert from_mapping(PrepareParams, {"seed": 2**53 + 1}, "prepare").seed == 2**53 + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"per_model": {"sasrec": {}, "gsasrec": {}, "cafe": {}, "lsq": {}}},
            "per_model.lsq: a model cannot have the name of a method",
        ),
        (
            {"per_model": {"sasrec": {}, "gsasrec": {}, "cafe": {}, "markov": {}}},
            "per_model.markov: a model cannot have the name of a baseline",
        ),
        ({"trian": {"lr": 1}}, "unknown key 'trian'; did you mean 'train'?"),
        ({"models": ["sasrecc"]}, "unknown model 'sasrecc'; did you mean 'sasrec'?"),
        ({"quantized": ["lsqq"]}, "unknown method in the list quantized 'lsqq'; did you mean 'lsq'?"),
        ({"variants": ["adarond"]}, "unknown variant 'adarond'; did you mean 'adaround'?"),
        ({"methods": {"apott": {}}}, "unknown key 'methods.apott'; did you mean 'methods.apot'?"),
        ({"quant": {"model": "gsasrecc"}}, "did you mean 'gsasrec'?"),
        ({"per_model": {"sasrec": {"train": {"epoch": 1}}}}, "did you mean 'per_model.sasrec.train.epochs'?"),
        ({"per_model": {"sasrec": {"modle": {}}}}, "did you mean 'per_model.sasrec.model'?"),
        # The nearest is not what was meant: where there are few, all of them are named.
        ({"device": "gpu"}, "unknown value of device 'gpu'; did you mean 'cpu'? known: auto, cpu, cuda"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [-1]}, "seeds must be between 0 and"),
        ({"seeds": [1, 1]}, "seeds names one twice: 1, 1"),
        ({"models": ["sasrec"]}, "variants names 'gsasrec', which is in neither models nor quantized"),
        ({"models": ["sasrec"], "variants": ["sasrec"], "quant": {"model": "gsasrec"}}, "not in the list models"),
        ({"threads": 0}, "threads must be"),
    ],
)
def test_names_that_nothing_knows_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_study(write(tmp_path, **changes))
    assert message in str(caught.value)


def test_a_choice_for_every_model_is_refused_where_one_of_them_cannot_follow(tmp_path: Path) -> None:
    train = {
        **yaml.safe_load((ROOT / "params.yaml").read_text())["train"],
        "loss": "sampled_softmax",
        "negative_sampling": "popularity",
    }
    assert read_study(write(tmp_path, train=train)).of_model("sasrec")[1].negative_sampling == "popularity"
    with pytest.raises(UserError, match=r"per_model\.gsasrec\.train\.negative_sampling is popularity, which loss: gbce"):
        read_study(write(tmp_path, train=train, per_model={"sasrec": {}, "gsasrec": {"train": {"loss": "gbce"}}}))


def test_an_override_is_judged_beside_what_it_overrides_not_beside_the_defaults(tmp_path: Path) -> None:
    """Sparse tables are refused with the default loss, and fine with the study's."""
    override: dict[str, Any] = {"sasrec": {}, "cafe": {}, "gsasrec": {"train": {"table_optimizer": "sparse"}}}
    study = read_study(write(tmp_path, train={"loss": "sampled_softmax"}, per_model=override))
    assert study.of_model("gsasrec")[1].table_optimizer == "sparse"
    with pytest.raises(UserError, match=r"per_model\.gsasrec\.train\.table_optimizer is sparse, but loss: cross_entropy"):
        read_study(write(tmp_path, per_model=override))


def test_broken_yaml_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("train: [1\nx: 2")
    with pytest.raises(UserError, match="not valid YAML") as caught:
        read_study(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="run from the root"):
        read_study(tmp_path / "absent.yaml")


def test_params_yaml_writes_every_default_out() -> None:
    """What a person sees in the file is what runs: no value hides in the code, and none differs from it unseen."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section in dataclasses.fields(Study):
        if isinstance(section.type, type) and dataclasses.is_dataclass(section.type):
            fields = {field.name for field in dataclasses.fields(section.type)}
            assert set(params[section.name]) == fields, section.name
            assert from_mapping(section.type, params[section.name], section.name) == section.type()


def test_params_yaml_writes_every_option_of_every_method_out() -> None:
    for name, options in yaml.safe_load((ROOT / "params.yaml").read_text())["methods"].items():
        module, chosen = load_method(name, options)
        assert set(options) == {field.name for field in dataclasses.fields(module.Options)}, name
        assert chosen == module.Options(), name


def test_overrides_of_one_model_leave_the_others() -> None:
    study = from_mapping(
        Study,
        {
            "models": ["a", "b"],
            "quantized": [],
            "variants": ["a"],
            "seeds": [0],
            "model": {"hidden": 32},
            "per_model": {"a": {}, "b": {"model": {"heads": 2}, "train": {"loss": "bce", "lr": "2e-3"}}},
        },
        "",
    )
    assert study.of_model("a") == (ModelParams(hidden=32), TrainParams())
    assert study.of_model("b") == (ModelParams(hidden=32, heads=2), TrainParams(loss="bce", lr=2e-3))


def test_of_a_section_that_is_declared_key_by_key_the_others_have_their_defaults(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, quant={"bits": 4, "table": "per_tensor", "model": "sasrec"}))
    assert Declared(study, ("quant.table", "quant.model")).quant == QuantParams(table="per_tensor")
    assert Declared(study, ("quant",)).quant.bits == 4


def test_a_stage_cannot_read_what_it_does_not_declare() -> None:
    study = read_study(ROOT / "params.yaml")
    declared = Declared(study, ("threads", "per_model.<model>"))
    assert declared.threads == study.threads
    with pytest.raises(AttributeError, match="does not declare"):
        _ = declared.quant
    with pytest.raises(AttributeError, match="does not declare"):
        _ = declared.of_model
