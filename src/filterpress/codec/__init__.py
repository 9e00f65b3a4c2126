"""The codec: integers and steps to bytes, and back. Needs numpy and numba; ONNX only in `graph`.

Example:
    >>> import numpy as np
    >>> from filterpress.codec import decode, encode, quantize, snap
    >>> weight = quantize(np.float32([[0.5, -1.0], [0.0, 0.26]]), snap(0.25))
    >>> decode(encode({"fc": weight}, graph=b"", header={})).tensors["fc"].integers
    array([[ 2, -4],
           [ 0,  1]], dtype=int32)
"""

from filterpress.codec.binarisation import estimate_bits
from filterpress.codec.bitstream import Decoded, Stream, decode, encode, stream
from filterpress.codec.delta import apply_delta, make_delta
from filterpress.codec.quantizer import QuantizedTensor, quantize, snap

__all__ = [
    "Decoded",
    "QuantizedTensor",
    "Stream",
    "apply_delta",
    "decode",
    "encode",
    "estimate_bits",
    "make_delta",
    "quantize",
    "snap",
    "stream",
]
