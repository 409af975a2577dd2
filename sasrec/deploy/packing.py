"""Integer codes as a stream of bits, any width from 1 to 8, least significant bit first."""

import numpy as np
from numpy.typing import NDArray


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The codes, flattened, one after another, ceil(n bits / 8) bytes. Code i takes the bits i * bits and following; bit j
    of the stream is bit j mod 8 of byte j // 8; the last byte is filled up with zeros. The inverse is
    `sasrec.deploy.recommender.tensors.unpack`.

    >>> pack(np.array([1, 2, 3], np.uint8), 2).tolist()  # 0b111001
    [57]
    """
    flat = np.ascontiguousarray(codes, np.uint8).reshape(-1)
    if flat.size and int(flat.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(flat.max())} does not fit into {bits} bits")
    at_once = 1 << 20  # a bit takes a byte meanwhile; the codes of a part fill whole bytes
    parts = [
        np.packbits(np.unpackbits(flat[at : at + at_once, None], axis=1, count=bits, bitorder="little"), bitorder="little")
        for at in range(0, len(flat), at_once)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)
