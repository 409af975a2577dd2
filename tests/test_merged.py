"""Parts of a grid merge to one reference: what they must share, what is compared with what, and what is chosen."""

import argparse
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from sasrec import merging, reference
from sasrec.compared import between
from sasrec.config import EvaluateParams
from sasrec.errors import UserError
from sasrec.files import read_json, sha256, write_json
from sasrec.merged import changed, changes
from sasrec.protocol import PROTOCOLS, quality, short_hash
from sasrec.report import widths, widths_figure
from sasrec.report.readme import filled
from stages import reference as command
from tests.conftest import ROOT

CARD = {"data": "toy", "users": 40, "items": 30}
PARAMS: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
USERS = 40
BASE = np.random.default_rng(0).integers(1, 9, USERS).astype(float)

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """make(name, ranks by variant, sizes, seeds, quant, ...) -> a kept reference in a folder of parts. Ranks are the same for
    every seed but for one user's."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, shifts: dict[str, float], seed: int = 0, size: int = 1000, **changed_params: Any) -> Path:
        models = [variant for variant in shifts if variant in ("sasrec", "h8", "h16")]
        quantized = [variant for variant in shifts if variant not in models]
        per_model: dict[str, Any] = {model: {} for model in models} | {"sasrec": {}}
        params = PARAMS | {"models": models, "quantized": quantized, "variants": list(shifts), "seeds": [seed]}
        # One rate at all widths, so that there is one control.
        params |= {"per_model": per_model, "quant": PARAMS["quant"] | {"lr": 0.0002} | changed_params.pop("quant", {})}
        params |= {"evaluate": PARAMS["evaluate"] | {"bootstrap": 200}} | changed_params
        folder = tmp_path / "parts" / name
        (folder / "ranks").mkdir(parents=True)
        variants = {}
        for variant, shift in shifts.items():
            ranks = BASE + shift
            ranks[seed] += 1
            for protocol in PROTOCOLS:
                reference.rank_file(folder, variant, seed, protocol).write_bytes(reference.packed(ranks))
            (folder / f"{variant}-{seed}.csv").write_text(f"epoch,lr\n0,{shift}\n")
            own = 4 * size if variant in models or variant == "control" else size
            sizes = {"bits": 4, "bytes": {"h8": 1500, "h16": 2500}.get(variant, own), "embedding_bytes": 1, "weight_bytes": 1}
            values = quality(dict.fromkeys(PROTOCOLS, ranks[None]), EvaluateParams(bootstrap=200))
            validation = {"coverage@10": 0.5, "valid_ndcg@10": 1 / (2 + shift)}
            variants[variant] = values | validation | sizes | {"card": short_hash(CARD)}
        (folder / "dvc.lock").write_text(f"of: {name}\n")
        content = {
            "command": f"dvc exp run -S 'seeds=[{seed}]'", "params": params,
            "environment": {"seconds": 60, "cpu": "x", "threads": 1},
            "data": {"file": "raw.txt", "sha256": "0" * 64}, "card": CARD,
            "tried": {"count": 0, "configurations": [], "test_reads": 1}, "published": [], "variants": variants,
            "comparisons": [],
        }  # fmt: skip
        write_json(folder.with_suffix(".json"), content)
        return folder.with_suffix(".json")

    return write


WHOLE = {"sasrec": 0.0, "control": 0.0}


def merge(*parts: Path) -> dict[str, Any]:
    command.merge("bits", [str(part) for part in parts])
    content: dict[str, Any] = read_json("metrics/reference/bits.json")
    return content


def test_parts_become_variants_by_method_width_and_line(make: Make) -> None:
    content = merge(
        make("a", WHOLE | {"ptq": 1.0, "lsq": 0.5}, quant={"bits": 4}),
        make("b", WHOLE | {"lsq": 0.0}, quant={"bits": 4, "preset": "paper"}),
        make("c", WHOLE | {"lsq": 2.0}, quant={"bits": 4, "embedding_bits": 2}),
        make("d", WHOLE | {"ptq": 1.0, "lsq": 0.5}, seed=1, quant={"bits": 4}),
    )
    assert list(content["variants"]) == ["sasrec", "control", "ptq-4-all", "lsq-4-all", "lsq-4-paper", "lsq-4-tables2"]
    run = content["runs"]["lsq-4-all"]
    assert (run["method"], run["bits"], run["line"], run["seeds"], run["parts"]) == ("lsq", 4, "all", [0, 1], ["a", "d"])
    assert content["environment"]["seconds"] == 240
    assert content["parts"][1]["params"]["set"] == {"quant.preset": "paper", "quantized": ["control", "lsq"]} | {
        "variants": ["sasrec", "control", "lsq"]
    }
    assert not list(Path("metrics/reference/bits/ranks").glob("*popsampled*"))
    rows = Path("metrics/reference/bits/curves.csv").read_text().splitlines()
    assert rows[0] == "variant,seed,epoch,lr" and "lsq-4-all,1,0,0.5" in rows
    command.check(["bits"])


def test_without_a_rate_each_has_the_control_of_its_width(make: Make) -> None:
    """quant.lr empty is the rate of the narrowest width, the control's, too."""
    whole = WHOLE | {"lsq": 1.0}
    content = merge(
        make("a", whole, quant={"bits": 8, "lr": None}),
        make("b", whole, quant={"bits": 6, "lr": 0.0002}),
        make("c", whole, quant={"bits": 2, "lr": None}),
    )
    compared = {row["variant"]: row["reference"] for row in content["comparisons"] if row["variant"].startswith("lsq")}
    assert compared == {"lsq-8-all": "control", "lsq-6-all": "control", "lsq-2-all": "control-lr0.004"}


def test_tables_alone_are_a_line_with_product_quantization_at_its_bits_a_number(make: Make) -> None:
    product = {"methods": PARAMS["methods"] | {"pq": {"splits": 16, "centroids": 128}}}
    content = merge(
        make("a", WHOLE | {"lsq": 1.0}, quant={"bits": 8, "embedding_bits": 2}),
        make("b", WHOLE | {"lsq": 2.0}, quant={"bits": 8, "embedding_bits": 1}),
        make("c", WHOLE | {"lsq": 0.0}, quant={"bits": 8}),
        make("d", WHOLE | {"pq": 1.5}, quant={"bits": 8}, **product),  # 16 x 7 bits for 64 numbers
    )
    names = ["lsq-8-all", "lsq-2-tables", "pq-2-tables", "lsq-1-tables"]
    assert list(content["variants"]) == ["sasrec", "control", *names]
    assert ("lsq-2-tables", "pq-2-tables") in {(row["variant"], row["reference"]) for row in content["comparisons"]}
    assert "- 1 bit, tables alone, the rest at 8 bits: **lsq**" in widths.words(widths.load(content))


def test_another_model_has_cells_and_a_control_of_its_own(make: Make) -> None:
    wide = {"quant": {"bits": 4, "model": "h16"}}
    content = merge(
        make("a", {"sasrec": 2.0, "control": 2.0, "ptq": 4.0, "lsq": 3.0}, quant={"bits": 4}),
        make("b", {"h16": 0.0, "control": 0.0, "ptq": 2.0, "lsq": 1.0}, size=2000, **wide),
    )
    names = ["h16", "sasrec", "control", "control-h16", "ptq-4-all", "lsq-4-all", "ptq-4-all-h16", "lsq-4-all-h16"]
    assert list(content["variants"]) == names
    rows = {(row["variant"], row["reference"]) for row in content["comparisons"]}
    assert {("lsq-4-all-h16", "control-h16"), ("ptq-4-all-h16", "h16"), ("lsq-4-all-h16", "ptq-4-all-h16")} <= rows
    assert ("lsq-4-all-h16", "lsq-4-all") not in rows
    assert [choice.get("model") for choice in content["choices"]] == [None, "h16"]
    found = widths.load(content)
    assert "- 4 bits, every tensor, of h16: **lsq**" in widths.words(found)
    # The control of h16 is as good as h16, and sasrec is smaller than neither, and worse.
    assert [own.name for own in found.smallest] == ["lsq-4-all", "lsq-4-all-h16", "h16"]
    size, what, validation, *_ = widths.smallest_table(found).splitlines()[3].strip("| ").split(" | ")
    assert (size, what, validation) == ("2.00 kB", "lsq, 4 bits, every tensor, of h16", "0.3333")
    command.check(["bits"])


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


def test_a_part_that_is_kept_anew_replaces_what_ranks_do_not_tell(make: Make) -> None:
    merge(make("a", WHOLE | {"ptq": 1.0}, quant={"bits": 4}, size=1000))
    shutil.rmtree("parts/a")
    content = merge(make("a", WHOLE | {"ptq": 1.0}, quant={"bits": 4}, size=2000))
    assert content["variants"]["ptq-4-all"]["bytes"] == 2000


def test_a_merged_reference_is_not_replaced_by_a_kept_one(make: Make) -> None:
    merge(make("a", WHOLE | {"ptq": 1.0}, quant={"bits": 4}))
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS))
    options = argparse.Namespace(name="bits", data="x", notes=None, seconds=1, command="c")
    with pytest.raises(UserError, match="is merged of several parts, which this would replace"):
        command.keep(options)


def test_four_lines_are_two_and_two() -> None:
    assert widths_figure.rows_of(["a"]) == [["a"]]
    assert widths_figure.rows_of(["a", "b", "c"]) == [["a", "a"], ["b", "c"]]
    assert widths_figure.rows_of(["a", "b", "c", "d"]) == [["a", "c"], ["b", "d"]]


def test_each_is_compared_with_its_reference_over_the_seeds_of_both(make: Make) -> None:
    content = merge(
        make("a", WHOLE | {"ptq": 1.0, "lsq": 0.5}, quant={"bits": 4}),
        make("b", WHOLE | {"lsq": 0.5}, seed=1, quant={"bits": 4}),
    )
    rows = {(row["variant"], row["reference"]): row for row in content["comparisons"]}
    assert set(rows) == {
        ("control", "sasrec"), ("ptq-4-all", "sasrec"), ("lsq-4-all", "control"), ("lsq-4-all", "ptq-4-all"),
    }  # fmt: skip
    assert rows["lsq-4-all", "control"]["seeds"] == 2 and rows["lsq-4-all", "ptq-4-all"]["seeds"] == 1
    ranks = BASE + (np.arange(USERS) == 0)
    gains = [np.where(r <= 10, 1 / np.log2(r + 1), 0) for r in (ranks + 0.5, ranks + 1)]
    assert rows["lsq-4-all", "ptq-4-all"]["difference"] == pytest.approx((gains[0] - gains[1]).mean(), abs=1e-5)
    assert rows["lsq-4-all", "ptq-4-all"]["verdict"] == "better"


def test_adding_later_gives_what_merging_at_once_gives(make: Make) -> None:
    parts = [
        make("m", {"sasrec": 0.0, "h8": 3.0}),
        make("b", WHOLE | {"lsq": 1.0}, quant={"bits": 6, "lr": 0.01}),
        make("a", WHOLE | {"lsq": 0.5}, quant={"bits": 4}),
    ]
    at_once = merge(*parts)
    files = {path.name: path.read_bytes() for path in Path("metrics/reference/bits").rglob("*") if path.is_file()}
    Path("metrics/reference/bits.json").unlink()
    for part in parts:
        later = merge(part)
    assert later == at_once
    assert {path.name: path.read_bytes() for path in Path("metrics/reference/bits").rglob("*") if path.is_file()} == files
    assert merge(parts[0]) == at_once


def test_another_recipe_has_a_control_of_its_own(make: Make) -> None:
    narrow = make("b", {"sasrec": 0.0, "control": 1.0, "lsq": 0.5}, quant={"bits": 2, "lr": 0.001})
    content = merge(narrow, make("a", WHOLE | {"lsq": 0.5}, quant={"bits": 8}))
    assert {name: run["reference"] for name, run in content["runs"].items()} == {
        "sasrec": None, "control": "sasrec", "control-lr0.001": "sasrec", "lsq-8-all": "control",
        "lsq-2-all": "control-lr0.001",
    }  # fmt: skip


def test_a_method_with_another_option_stands_beside_it_under_a_name_of_its_own(make: Make) -> None:
    def options(**own: Any) -> dict[str, Any]:
        return PARAMS["methods"] | {method: PARAMS["methods"][method] | values for method, values in own.items()}

    content = merge(
        make("a", WHOLE | {"pact": 0.5, "lsq": 1.5}, quant={"bits": 4}),
        make("b", WHOLE | {"pact": 1.0}, quant={"bits": 4}, methods=options(pact={"weights": "sawb", "lr": 0.01})),
        make("c", WHOLE | {"lsq": 2.0}, quant={"bits": 4}, methods=options(lsq={"offset": True})),
    )
    assert list(content["runs"]) == ["sasrec", "control", "lsq-4-all", "lsq-offset-4-all", "pact-4-all", "pact-sawb-4-all"]
    assert content["runs"]["pact-sawb-4-all"]["method"] == "pact-sawb"
    assert content["runs"]["pact-sawb-4-all"]["parts"] == ["b"]
    # A run of another seed is held to the options of its own name.
    with pytest.raises(UserError, match=r"pact-sawb-4-all was made with methods\.pact\.lr: 0\.01 in b, and with None in d"):
        merge(make("d", WHOLE | {"pact": 1.0}, seed=1, quant={"bits": 4}, methods=options(pact={"weights": "sawb"})))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"shifts": {"sasrec": 1.0, "control": 0.0}}, r"sasrec, seed 0, of b and of a is not the same model"),
        ({"shifts": {"sasrec": 0.0, "control": 1.0}}, r"control, seed 0, of b and of a is not the same model"),
        ({"shifts": WHOLE | {"lsq": 2.0}}, r"lsq-4-all, seed 0, of b and of a comes twice, with different ranks"),
        (
            {"shifts": WHOLE | {"lsq": 0.5}, "seed": 1, "quant": {"bits": 4, "table": "per_tensor"}},
            r"lsq-4-all was made with quant\.table: per_row in a, and with per_tensor in b",
        ),
        ({"shifts": {"sasrec": 0.0, "lsq": 0.5}, "seed": 1}, r"lsq-4-all has seed 1, but its reference control has not"),
        ({"shifts": WHOLE | {"lsq": 1.0}, "quant": {"bits": 4, "overrides": {"final": 8}}}, r"not quant\.overrides"),
    ],
)
def test_parts_that_do_not_fit_are_refused_and_nothing_is_written(make: Make, second: dict[str, Any], message: str) -> None:
    first = make("a", WHOLE | {"lsq": 0.5}, quant={"bits": 4})
    merge(first)
    before = {path: path.read_bytes() for path in Path("metrics").rglob("*") if path.is_file()}
    other = make("b", **({"quant": {"bits": 4}} | second))
    with pytest.raises(UserError, match=message):
        command.merge("bits", [str(other)])
    assert {path: path.read_bytes() for path in Path("metrics").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data", {"file": "raw.txt", "sha256": "1" * 64}, "other data"),
        ("card", CARD | {"users": 3}, "another protocol: users is '3', not '40'"),
        ("runs", {}, "is merged itself"),
    ],
)
def test_parts_of_other_data_or_protocols_are_refused(make: Make, key: str, value: object, message: str) -> None:
    first, second = make("a", WHOLE), make("b", WHOLE, seed=1)
    write_json(second, read_json(second) | {key: value})
    with pytest.raises(UserError, match=message):
        command.merge("bits", [str(first), str(second)])
    with pytest.raises(UserError, match=r"metrics/reference/none\.json does not exist"):
        command.merge("bits", ["none"])


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("variants", "lsq-4-all", "ndcg@10"), 0.9, r"lsq-4-all: ndcg@10 is 0\.9, the ranks give"),
        (("frontier", 0, "verdict"), "worth it", "frontier of ptq-4-all: verdict is worth it, the ranks give not worth it"),
        (("choices", 0, "best"), "ptq-4-all", "choices of 4 bits, all: best is ptq-4-all, the ranks give lsq-4-all"),
        (("comparisons", 0, "low"), -9.0, r"low is -9\.0"),
    ],
)
def test_check_notices_what_the_ranks_do_not_give(make: Make, path: tuple[Any, ...], value: object, message: str) -> None:
    content = merge(
        make("a", WHOLE | {"ptq": 3.0, "lsq": 0.0}, size=2000, quant={"bits": 4}), make("m", {"sasrec": 0.0, "h8": 1.0})
    )
    inner: Any = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    write_json("metrics/reference/bits.json", content)
    with pytest.raises(UserError, match=message):
        command.check(["bits"])


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


def test_differences_of_parameters_can_be_undone() -> None:
    base, other = {"a": {"b": 1, "c": {}}, "d": 2}, {"a": {"b": 1, "c": {"e": 3}}, "f": {"g": [1]}}
    assert changes(base, other) == {"set": {"a.c.e": 3, "f.g": [1]}, "without": ["a.c", "d"]}
    assert changed(base, changes(base, other)) == other


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


def test_merged_files_are_read_back(make: Make) -> None:
    merge(make("a", WHOLE | {"lsq": 0.5}, quant={"bits": 4}))
    grid = merging.read("bits")
    assert grid.parts["a"].params["quant"]["bits"] == 4
    Path("metrics/reference/bits/locks/a.lock.gz").unlink()
    with pytest.raises(UserError, match=r"a\.lock\.gz does not exist"):
        merging.read("bits")
