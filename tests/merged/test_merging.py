"""Parts of a grid merge to one reference: what they must share, and what is compared with what."""

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sasrec import merging
from sasrec.errors import UserError
from sasrec.files import read_json, write_json
from sasrec.merged import changed, changes
from sasrec.report import widths
from stages import reference as command
from tests.merged.conftest import BASE, CARD, PARAMS, USERS, WHOLE, Make, merge


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


def test_differences_of_parameters_can_be_undone() -> None:
    base, other = {"a": {"b": 1, "c": {}}, "d": 2}, {"a": {"b": 1, "c": {"e": 3}}, "f": {"g": [1]}}
    assert changes(base, other) == {"set": {"a.c.e": 3, "f.g": [1]}, "without": ["a.c", "d"]}
    assert changed(base, changes(base, other)) == other


def test_merged_files_are_read_back(make: Make) -> None:
    merge(make("a", WHOLE | {"lsq": 0.5}, quant={"bits": 4}))
    grid = merging.read("bits")
    assert grid.parts["a"].params["quant"]["bits"] == 4
    Path("metrics/reference/bits/locks/a.lock.gz").unlink()
    with pytest.raises(UserError, match=r"a\.lock\.gz does not exist"):
        merging.read("bits")
