"""Codes as streams of bits, and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sasrec.deploy.packing import pack
from sasrec.deploy.recommender.tensors import unpack


def test_bits_are_packed_least_significant_first() -> None:
    # Three-bit codes 1, 7, 2, 5: the stream, bit 0 first, is 100 111 010 101, in bytes 01111001 and 1010 upside down.
    assert pack(np.array([1, 7, 2, 5], np.uint8), 3).tolist() == [0b10111001, 0b1010]
    assert pack(np.array([1, 0, 1], np.uint8), 1).tolist() == [0b101]
    assert pack(np.array([200, 3], np.uint8), 8).tolist() == [200, 3]


@given(st.integers(1, 8), st.data())
def test_packing_round_trips_at_every_width(bits: int, data: st.DataObject) -> None:
    shape = data.draw(arrays.array_shapes(max_dims=2, max_side=9))
    codes = data.draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    stream = pack(codes, bits)
    assert len(stream) == -(-codes.size * bits // 8)
    assert (unpack(stream, bits, shape) == codes).all()


@pytest.mark.parametrize("bits", [3, 4, 7])
def test_long_streams_round_trip(bits: int) -> None:
    """More codes than are worked on at once."""
    codes = np.random.default_rng(0).integers(0, 2**bits, 2**20 + 5).astype(np.uint8)
    assert (unpack(pack(codes, bits), bits, codes.shape) == codes).all()


def test_codes_that_do_not_fit_and_streams_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="does not fit into 3 bits"):
        pack(np.array([8], np.uint8), 3)
    with pytest.raises(ValueError, match="do not hold"):
        unpack(np.zeros(2, np.uint8), 3, (6,))
