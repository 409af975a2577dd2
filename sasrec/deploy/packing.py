"""Integer codes as a stream of bits, any width from 1 to 8, least significant bit first."""

import numpy as np
from numpy.typing import NDArray


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The codes, flattened, one after another, ceil(n bits / 8) bytes. Code i takes the bits i * bits and following; bit j
    of the stream is bit j mod 8 of byte j // 8; the last byte is filled up with zeros.

    >>> pack(np.array([1, 2, 3], np.uint8), 2).tolist()  # 0b111001
    [57]
    """
    flat = np.ascontiguousarray(codes, np.uint8).reshape(-1)
    if flat.size and int(flat.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(flat.max())} does not fit into {bits} bits")
    return np.packbits(np.unpackbits(flat[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")


def unpack(stream: NDArray[np.uint8], bits: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The inverse of `pack`. Raises ValueError where the stream's length does not fit the shape."""
    count = int(np.prod(shape))
    if len(stream) != -(-count * bits // 8):
        raise ValueError(f"{len(stream)} bytes do not hold {count} codes of {bits} bits")
    bit = np.unpackbits(stream, count=count * bits, bitorder="little").reshape(count, bits)
    return np.packbits(bit, axis=1, bitorder="little").reshape(shape)
