"""Integers and a step: the form in which every tensor travels.

A weight is ``integers * scale``. The scale lies on the grid ``2**(k / 64)``, so a file stores the
small integer ``k`` instead of a float, and every machine rebuilds the same float32: the 64
mantissas are computed in integer arithmetic, never by the machine's own ``pow``.
"""

from __future__ import annotations

from functools import cache
from math import isqrt
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Number = TypeVar("_Number", bound=np.number)

MAX_MAGNITUDE = 2**20
MIN_EXPONENT, MAX_EXPONENT = -4096, 4095
_STEPS = 64


@cache
def two_to_the(numerator: int, log2_denominator: int) -> int:
    """Return ``2**(numerator / 2**log2_denominator)`` in ``2**-52``, from integer square roots."""
    root = 1 << (numerator + (52 << log2_denominator))
    for _ in range(log2_denominator):
        root = isqrt(root)
    return root


_MANTISSAS = np.array([two_to_the(k, 6) / 2**52 for k in range(_STEPS)], np.float32)
_RATIO_BITS = 40
_RATIOS = np.array([two_to_the(k, 6) >> (52 - _RATIO_BITS) for k in range(_STEPS)], np.int64)
_MIDPOINTS = np.array([two_to_the(2 * k + 1, 7) / 2**52 for k in range(_STEPS)], np.float64)


class QuantizedTensor(NamedTuple):
    """A tensor as integers and a step.

    Attributes:
        integers: int32 of any shape of up to five dimensions, within ±2**20.
        scale: float32 on the grid of `snap`, of shape ``()`` or ``(integers.shape[0],)``.
    """

    integers: NDArray[np.int32]
    scale: NDArray[np.float32]

    def dequantize(self) -> NDArray[np.float32]:
        """Return ``integers * scale`` in float32, the scale broadcast along axis 0.

        Example:
            >>> integers = np.array([[1, -2], [3, 0]], np.int32)
            >>> QuantizedTensor(integers, snap([0.5, 2.0])).dequantize()
            array([[ 0.5, -1. ],
                   [ 6. ,  0. ]], dtype=float32)
        """
        integers = self.integers.astype(np.float32)
        return integers * _along_axis_0(self.scale, self.integers.ndim)


def snap(scale: ArrayLike) -> NDArray[np.float32]:
    """Return the nearest step on the grid ``2**(k / 64)``, nearest in the ratio.

    Steps outside ``[2**-64, 2**63.98]`` become the nearest end of the grid.

    Args:
        scale: Positive, finite; any shape.

    Returns:
        float32 of the same shape. What is on the grid stays.

    Raises:
        ValueError: A step is not positive or not finite.

    Example:
        >>> snap([0.25, 0.1]), float(snap(1e-30)) == 2.0**-64
        (array([0.25      , 0.09957138], dtype=float32), True)
    """
    wide = np.asarray(scale, np.float64)
    valid = np.isfinite(wide) & (wide > 0)
    if not valid.all():
        raise ValueError(f"scale must be positive and finite, got {wide[~valid].flat[0]}")
    mantissa, exponent = np.frexp(wide)
    step = np.searchsorted(_MIDPOINTS, 2 * mantissa)
    return from_exponents((exponent.astype(np.int64) - 1) * _STEPS + step)


def from_exponents(exponents: ArrayLike) -> NDArray[np.float32]:
    """Return the steps ``2**(k / 64)``, with ``k`` clipped to the grid's range."""
    k = np.clip(np.asarray(exponents, np.int64), MIN_EXPONENT, MAX_EXPONENT)
    return np.asarray(np.ldexp(_MANTISSAS[k % _STEPS], (k // _STEPS).astype(np.int32)))


def to_exponents(scale: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return ``k`` of steps ``2**(k / 64)``; the inverse of `from_exponents`.

    Raises:
        ValueError: A step does not lie on the grid.
    """
    scale = np.asarray(scale, np.float32)
    mantissa, exponent = np.frexp(scale)
    step = np.minimum(np.searchsorted(_MANTISSAS, 2 * mantissa), _STEPS - 1)
    exponents = (exponent.astype(np.int32) - 1) * _STEPS + step.astype(np.int32)
    off_grid = from_exponents(exponents) != scale
    if np.any(off_grid):
        raise ValueError(f"scale must lie on the grid of snap, got {scale[off_grid].flat[0]}")
    return np.asarray(exponents, np.int32)


def quantize(weight: ArrayLike, scale: ArrayLike) -> QuantizedTensor:
    """Round a weight to the multiples of a step.

    Args:
        weight: float32 of up to five dimensions, finite.
        scale: Steps on the grid of `snap`, of shape ``()`` or ``(weight.shape[0],)``.

    Returns:
        ``round(weight / scale)``, halves to even, clipped to ±2**20.

    Raises:
        ValueError: A weight is not finite, or the scale has another shape or is off the grid.

    Example:
        >>> quantize([0.5, 0.75, -1.0], snap(0.5)).integers
        array([ 1,  2, -2], dtype=int32)
    """
    weight, scale = np.asarray(weight, np.float32), np.asarray(scale, np.float32)
    if not np.isfinite(weight).all():
        raise ValueError(f"weight must be finite, got {weight[~np.isfinite(weight)].flat[0]}")
    to_exponents(scale)
    if scale.shape not in ((), weight.shape[:1]):
        raise ValueError(f"scale must have shape () or {weight.shape[:1]}, got {scale.shape}")
    ratio = weight.astype(np.float64) / _along_axis_0(scale, weight.ndim)
    rounded = np.clip(np.rint(ratio), -MAX_MAGNITUDE, MAX_MAGNITUDE)
    return QuantizedTensor(rounded.astype(np.int32), scale)


def restep(
    integers: NDArray[np.int32], old: NDArray[np.int32], new: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Write a tensor in other steps, in integer arithmetic.

    Args:
        integers: int32, within ±2**20.
        old: Exponents of its steps, of shape () or (integers.shape[0],).
        new: Exponents of the other steps, of the same shape.

    Returns:
        ``integers * 2**((old - new) / 64)``, rounded, halves away from zero, and clipped to ±2**20.
        The factor is rounded down to 40 bits after the point of its mantissa.

    Example:
        >>> restep(np.array([1, -3, 4], np.int32), np.int32(-64), np.int32(0))
        array([ 1, -2,  2], dtype=int32)
    """
    if np.array_equal(old, new):
        return integers
    octaves, step = np.divmod(old.astype(np.int64) - new, _STEPS)
    # Beyond these shifts every product is 0 or over the limit, and none overflows.
    shift = _along_axis_0(np.clip(_RATIO_BITS - octaves, _RATIO_BITS - 21, 62), integers.ndim)
    magnitudes = np.multiply(np.abs(integers), _along_axis_0(_RATIOS[step], integers.ndim))
    magnitudes += 1 << shift >> 1
    magnitudes >>= shift
    limited = np.minimum(magnitudes, MAX_MAGNITUDE).astype(np.int32)
    return np.asarray(np.sign(integers) * limited)


def _along_axis_0(scale: NDArray[_Number], n_dims: int) -> NDArray[_Number]:
    return scale.reshape(-1, *[1] * (n_dims - 1)) if scale.ndim else scale
