"""The rates that hold where params.yaml leaves them empty."""

import re
from typing import Any

import pytest

from sasrec.config import QuantParams
from sasrec.mapping import from_mapping
from sasrec.models.sasrec import SASRec
from sasrec.models.taps import taps
from sasrec.quant import apot, attach, lsq, pact, pq
from sasrec.quant.rates import OF_WEIGHTS, narrowest, of_weights, of_width
from tests.conftest import ROOT


@pytest.mark.parametrize(("bits", "rate"), [(1, 0.3), (2, 0.3), (3, 0.2), (5, 0.2), (6, 0.1), (8, 0.1)])
def test_a_rate_holds_from_its_width_up_to_the_next(bits: int, rate: float) -> None:
    assert of_width({1: 0.3, 3: 0.2, 6: 0.1}, bits) == rate


@pytest.mark.parametrize("table", [OF_WEIGHTS, lsq.RATES, pact.RATES, apot.RATES, pq.RATES])
def test_every_width_has_a_rate_and_a_narrower_grid_no_smaller_one(table: dict[int, float]) -> None:
    found = [of_width(table, bits) for bits in range(1, 9)]
    assert found == sorted(found, reverse=True) and found[-1] > 0


@pytest.mark.parametrize(
    ("quant", "bits"),
    [
        ({}, 8),
        ({"bits": 3}, 3),
        ({"bits": 4, "activation_bits": 8}, 4),
        ({"embedding_bits": 1}, 1),
        ({"bits": 4, "weight_bits": 2}, 2),
        ({"bits": 4, "preset": "paper"}, 4),
        ({"bits": 8, "preset": "paper", "embedding_bits": 2}, 2),
        # Nothing has the width of quant.bits where each kind has one of its own.
        ({"bits": 2, "weight_bits": 8, "activation_bits": 8, "preset": "paper"}, 8),
        ({"bits": 4, "overrides": {"a": 3, "b": 32}}, 3),
    ],
)
def test_the_narrowest_width(quant: dict[str, Any], bits: int) -> None:
    assert narrowest(from_mapping(QuantParams, quant, "quant")) == bits


@pytest.mark.parametrize("preset", ["all", "paper"])
@pytest.mark.parametrize("own", [{}, {"weight_bits": 2}, {"activation_bits": 3}, {"embedding_bits": 1}])
def test_the_narrowest_width_is_that_of_a_tensor_of_the_model(model: SASRec, preset: str, own: dict[str, int]) -> None:
    quant = from_mapping(QuantParams, {"bits": 4, "preset": preset, **own}, "quant")
    assert narrowest(quant) == min(attach.width(tap.place(name), quant) for name, tap in taps(model).items())


def test_documents_say_the_rates_that_are_used() -> None:
    text = (ROOT / "sasrec/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d, ]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    said = {int(bits): [float(rate) for rate in rates] for widths, *rates in rows for bits in widths.split(", ")}
    tables = (OF_WEIGHTS, lsq.RATES, pact.RATES, apot.RATES)
    assert said == {bits: [of_width(table, bits) for table in tables] for bits in range(1, 9)}
    params = (ROOT / "params.yaml").read_text(encoding="utf-8")
    comments = re.findall(r"^ +lr: +# empty: by (?:the narrowest|each tensor's) width: (.*)$", params, re.MULTILINE)
    for table, comment in zip(tables, comments, strict=True):
        assert re.findall(r"0\.\d+", comment) == [f"{rate:g}" for rate in sorted(set(table.values()))]
    for name, document in (("decay: +#", params), ("`methods.pact.decay` ", text)):
        (line,) = re.findall(rf"^.*{name}.*$", document, re.MULTILINE)
        assert re.findall(r"0\.\d+", line.split("empty: ")[1]) == [f"{decay:g}" for decay in pact.DECAYS.values()]


def test_a_rate_that_is_given_holds_at_every_width() -> None:
    assert {of_weights(QuantParams(bits=bits, lr=0.7)) for bits in range(2, 9)} == {0.7}
    assert of_weights(QuantParams(bits=2)) > of_weights(QuantParams(bits=8))


@pytest.mark.parametrize(("method", "rates"), [("lsq", lsq.RATES), ("pact", pact.RATES), ("apot", apot.RATES)])
def test_what_a_quantizer_learns_goes_at_the_rate_of_its_own_width(model: SASRec, method: str, rates: dict[int, float]) -> None:
    """Not at that of the study's: 2-bit tables, 4-bit weights and 8-bit activations have three rates."""
    quant = QuantParams(bits=8, weight_bits=4, embedding_bits=2)
    module, options = attach.load_method(method, None)
    attach.attach(model, quant, module, options)
    built = attach.quantizers(model)
    groups = attach.own_training(model, 0).parameters
    rate_of = {id(parameter): rate for rate, parameters in groups.items() for parameter in parameters}
    learned = [(q.bits, rate_of[id(p)]) for q in built.values() for p in q.parameters() if id(p) in rate_of]
    assert len(learned) == len(rate_of)
    assert all(rate == of_width(rates, bits) for bits, rate in learned)
    # PACT learns nothing of weights and tables.
    assert {bits for bits, _ in learned} == ({8} if method == "pact" else {2, 4, 8})
    given = attach.build(model, quant, *attach.load_method(method, {"lr": 0.5}))
    assert set(attach.parameters(given.values())[0]) == {0.5}
