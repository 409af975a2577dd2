"""The exact levels of every method at every width, written out, and the table that the report reads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sasrec.quant.conventions import Kind, convention
from sasrec.quant.quantizer import BinaryQuantizer, Quantizer

Build = Callable[..., Quantizer]

# bits: lowest and highest of the consecutive levels, in units of the scale.
FULL = {2: (-2, 1), 3: (-4, 3), 4: (-8, 7), 5: (-16, 15), 6: (-32, 31), 7: (-64, 63), 8: (-128, 127)}
SYMMETRIC = {2: (-1, 1), 3: (-3, 3), 4: (-7, 7), 5: (-15, 15), 6: (-31, 31), 7: (-63, 63), 8: (-127, 127)}
UNSIGNED = {2: (0, 3), 3: (0, 7), 4: (0, 15), 5: (0, 31), 6: (0, 63), 7: (0, 127), 8: (0, 255)}
# APoT: magnitudes of b bits, in units of the smallest term, by the authors' code (github.com/yhhhli/APoT_Quantization,
# CIFAR10/models/quant_layer.py, build_power_value), which has them up to 6 bits; a signed tensor of b bits has those of b - 1.
ADDITIVE = {
    1: (0, 1),
    2: (0, 1, 2, 4),
    3: (0, 1, 2, 3, 4, 6, 8, 10),
    4: (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48),
    5: (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 17, 20, 21, 24, 28, 32, 34, 36, 38, 48, 52, 64, 65, 68, 69, 72, 76, 96, 100),
    6: (
        0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 17, 20, 21, 24, 28, 32, 33, 34, 35, 40, 42, 48, 49, 56, 64, 66, 68, 70, 80,
        84, 96, 98, 112, 128, 129, 132, 133, 136, 140, 160, 161, 168, 192, 196, 224, 256, 257, 258, 259, 264, 266, 272, 273,
        280, 320, 322, 336, 384, 385, 392, 448,
    ),
}  # fmt: skip
# The authors stop there. How many, the first and the last few.
LONG_ADDITIVE = {
    7: (128, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (776, 777, 784, 792, 896, 904)),
    8: (256, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (3330, 3360, 3584, 3585, 3600, 3840)),
}
KINDS: tuple[Kind, ...] = ("weight", "table", "activation")
UNIFORM: list[tuple[str, dict[str, Any]]] = [("ptq", {}), ("ste", {}), ("lsq", {}), ("adaround", {})]
TWO_SIDED: list[tuple[str, dict[str, Any]]] = [
    ("pact", {}),
    ("dorefa", {}),
    ("dorefa", {"grid": "paper"}),
    ("dorefa", {"grid": "zero"}),
]


def found(build: Build, method: str, bits: int, kind: Kind, signed: bool = True, **options: Any) -> list[float]:
    """Levels in units of the scale."""
    values = torch.randn(8, 64) if signed else torch.randn(8, 64).relu()
    values = values.flatten() if kind == "activation" else values
    quantizer = build(method, bits, kind, values=values, signed=signed, **options)
    grid = quantizer.grid(None if kind == "activation" else values)
    assert method == "apot" or not grid.shift.any()
    return grid.levels.tolist()


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_of_signed_tensors(build: Build, bits: int) -> None:
    full, symmetric = (list(range(low, high + 1)) for low, high in (FULL[bits], SYMMETRIC[bits]))
    for method, options in UNIFORM:
        for kind in KINDS:
            assert found(build, method, bits, kind, **options) == full, (method, kind)
    paper = list(range(-(2**bits) + 1, 2**bits, 2))  # 2^b numbers, as far under 0 as over it, none of them 0
    for method, options in TWO_SIDED:
        assert found(build, method, bits, "activation", **options) == full, method
        wanted = paper if options.get("grid") == "paper" or (bits < 4 and not options) else symmetric
        for kind in KINDS[:2]:
            assert found(build, method, bits, kind, **options) == wanted, (method, kind, options)
    if bits in (2, 4, 8):
        assert found(build, "pact", bits, "weight", weights="sawb") == symmetric


@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_of_unsigned_activations(build: Build, bits: int) -> None:
    levels = list(range(UNSIGNED[bits][0], UNSIGNED[bits][1] + 1))
    for method, options in [*UNIFORM, *TWO_SIDED, ("lsq", {"offset": True})]:
        assert found(build, method, bits, "activation", signed=False, **options) == levels, method


@pytest.mark.parametrize("bits", range(1, 9))
def test_additive_powers_of_two(build: Build, bits: int) -> None:
    signed = found(build, "apot", bits + 1, "weight") if bits < 8 else []
    unsigned = found(build, "apot", bits, "activation", signed=False) if bits > 1 else []
    for levels in filter(None, (unsigned, signed[len(signed) // 2 :])):
        if bits in ADDITIVE:
            assert tuple(levels) == ADDITIVE[bits]
        else:
            count, first, last = LONG_ADDITIVE[bits]
            assert (len(levels), tuple(levels[: len(first)]), tuple(levels[-len(last) :])) == (count, first, last)
    assert signed == [-level for level in reversed(signed)]
    # Of a signed activation of 2 bits the code that is left over is -2 alpha.
    spare = [2 * signed[0]] if bits == 1 else []
    assert not signed or found(build, "apot", bits + 1, "activation") == [*spare, *signed]


def test_an_offset_moves_the_levels_by_whole_steps(build: Build) -> None:
    """LSQ+: still 2^b consecutive levels, 0 among them."""
    for bits in range(2, 9):
        values = torch.rand(4000) * 3 - 0.5
        levels = build("lsq", bits, values=values, offset=True).grid().levels.tolist()
        assert levels == list(range(int(levels[0]), int(levels[0]) + 2**bits))
        assert -(2 ** (bits - 1)) < levels[0] <= 0 < levels[-1]


def test_one_bit(build: Build) -> None:
    binary = BinaryQuantizer(build("ptq", 2, "table", values=torch.randn(4, 8)).place, 1, True)
    assert binary.grid(torch.randn(4, 8)).levels.tolist() == [-1, 1]
    assert convention("lsq", 1, "table").levels == 2


CASES: list[tuple[str, dict[str, Any]]] = [
    *UNIFORM, *TWO_SIDED, ("apot", {}), ("lsq", {"offset": True}), ("pact", {"weights": "sawb"}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_reports_table_is_what_the_grids_are(build: Build, method: str, options: dict[str, Any], bits: int) -> None:
    if options.get("weights") == "sawb" and bits not in (2, 4, 8):
        pytest.skip("not published")
    places: list[tuple[Kind, bool]] = [("weight", True), ("table", True), ("activation", True), ("activation", False)]
    for kind, signed in places:
        values: Tensor = torch.randn(8, 64) if signed else torch.rand(8, 64)
        values = values.flatten() if kind == "activation" else values
        quantizer = build(method, bits, kind, values=values, signed=signed, **options)
        grid = quantizer.grid(None if kind == "activation" else values)
        said = convention(method, bits, kind, options, signed)
        assert (said.levels, said.zero) == (len(grid.levels), grid.has_zero), (kind, signed)
        assert said.symmetric == torch.equal(grid.levels, -grid.levels.flip(0))
