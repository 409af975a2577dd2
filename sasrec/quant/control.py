"""The control: the full-precision model trained on for as long as the quantized ones, by the same code, without quantizers.

What a method gains over the checkpoint may be the longer training alone; against the control it is the method's own.
"""

from dataclasses import dataclass

TRAINS = True
# Not even to one bit, where the quantizer is the same for every method.
QUANTIZES = False


@dataclass(frozen=True)
class Options:
    """None."""
