"""Plain post-training quantization: scales from data, nothing is trained. The baseline that every method must beat."""

from dataclasses import dataclass

from sasrec.config import within
from sasrec.models.taps import Place
from sasrec.quant.quantizer import FixedScale, Quantizer, Rule

TRAINS = False


@dataclass(frozen=True)
class Options:
    # What sets a scale: minmax: nothing is clipped; percentile: that share of the magnitudes is not; mse: least squared
    # error. At 8 bits they agree; below, min-max spends its few levels on the tails.
    range: Rule = "mse"
    percentile: float = 99.99  # only for range: percentile

    def __post_init__(self) -> None:
        within("percentile", self.percentile, 50, 100)


def build(place: Place, bits: int, per_row: bool, options: Options) -> Quantizer:
    return FixedScale(place, bits, per_row, options.range, options.percentile)
