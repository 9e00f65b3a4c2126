"""The best path of integers through a trellis of grids, with errors fed back on the way.

Reference:
    H. Schwarz et al., "Hybrid video coding with trellis-coded quantization", DCC 2019, for grids
    and states. That each survivor feeds back errors of its own is per-survivor processing: Raheli
    et al., IEEE Trans. Comm. 1995.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from filterpress.rounding import _dot

Integers = NDArray[np.int64]


class Trellis(NamedTuple):
    """How integers choose the grids of those after them.

    Attributes:
        following: (S, 2) state after an even, and after an odd integer.
        grids: (S,) 0 for multiples of ``spacing``, 1 for those less the sign.
        spacing: Steps from one integer to the next.
    """

    following: Integers
    grids: Integers
    spacing: int


ONE_GRID = Trellis(np.zeros((1, 2), np.int64), np.zeros(1, np.int64), 1)
FOUR = Trellis(np.array([(0, 2), (2, 0), (1, 3), (3, 1)]), np.array([0, 0, 1, 1]), 2)
EIGHT = Trellis(
    np.array([(0, 2), (7, 5), (1, 3), (6, 4), (2, 0), (5, 7), (3, 1), (4, 6)]),
    np.array([0, 1] * 4),
    2,
)


def states_of(integers: Integers, trellis: Trellis) -> Integers:
    """Return the state ``(O, d)`` that each integer of rows was chosen in."""
    states = np.zeros_like(integers)
    for i in range(1, integers.shape[1]):
        states[:, i] = trellis.following[states[:, i - 1], integers[:, i - 1] & 1]
    return states


class Paths(NamedTuple):
    """The paths through one row.

    Attributes:
        costs: (P,) so far.
        states: (P,) they are in.
        errors: (2, P, d) of the columns so far, of old paths and of new ones in turn.
        parents: (d, P) path before each column.
        picks: (d, P) integer in each column.
        kept: (S, P / S, 4) cost, parent, integer and error of the best paths to each state.
    """

    costs: NDArray[np.float64]
    states: Integers
    errors: NDArray[np.float32]
    parents: Integers
    picks: Integers
    kept: NDArray[np.float64]


@njit(cache=True)
def search_rows(
    rows: NDArray[np.float32],
    factor: NDArray[np.float32],
    pivots: NDArray[np.float32],
    steps: NDArray[np.float32],
    gain: NDArray[np.float32],
    price: NDArray[np.float32],
    trellis: Trellis,
    n_listed: int,
    integers: Integers,
) -> None:
    """Find the integers of least cost of each row.

    Args:
        rows: (O, d) weights.
        factor: (d, d) lower triangular: so much of the error of column j goes to column i. Empty
            where errors are not fed back.
        pivots: (d,) what an error is divided by.
        steps: (O,).
        gain: (O,) damage of a squared error.
        price: (O, S, M) damage that the bits of a magnitude are worth; the last one is that of all
            larger ones, too.
        trellis: Of the integers.
        n_listed: Survivors of each state.
        integers: (O, d), filled.
    """
    d, n_states = rows.shape[1], len(trellis.grids)
    n = n_states * n_listed
    paths = Paths(
        np.zeros(n),
        np.zeros(n, np.int64),
        np.zeros((2, n, d), np.float32),
        np.zeros((d, n), np.int64),
        np.zeros((d, n), np.int64),
        np.zeros((n_states, n_listed, 4)),
    )
    for row in range(len(rows)):
        alive, paths.costs[0], paths.states[0] = 1, 0.0, 0
        for i in range(d):
            paths.kept[:, :, 0] = np.inf
            for path in range(alive):
                value = rows[row, i]
                if factor.size:
                    value -= _dot(paths.errors[i & 1, path], factor[i], i)
                scale = steps[row] / pivots[i]
                _extend(paths, path, value / steps[row], scale, gain[row], price[row], trellis)
            alive = _survive(paths, i, factor.size > 0)
        path = np.argmin(paths.costs[:alive])
        for i in range(d - 1, -1, -1):
            integers[row, i] = paths.picks[i, path]
            path = paths.parents[i, path]


@njit(cache=True)
def _extend(
    paths: Paths,
    path: int,
    units: float,
    scale: float,
    gain: float,
    price: NDArray[np.float32],
    trellis: Trellis,
) -> None:
    """Go on from a path to the integers near a value in steps, and to zero."""
    state, size, side = paths.states[path], abs(units), 1 if units > 0 else -1
    grid, last = trellis.grids[state], price.shape[1] - 1
    above = int((size + grid) / trellis.spacing) + 1
    for below in range(4):
        k = above - below if below < 3 else 0
        if below < 3 and k < 1:
            continue
        level = trellis.spacing * k - grid if k else 0
        error = (size - level) * scale
        cost = paths.costs[path] + gain * error**2 + price[state, min(k, last)]
        kept = paths.kept[trellis.following[state, k & 1]]
        place = len(kept) - 1
        if cost >= kept[place, 0]:
            continue
        while place > 0 and kept[place - 1, 0] > cost:
            kept[place] = kept[place - 1]
            place -= 1
        kept[place, 0], kept[place, 1] = cost, path
        kept[place, 2], kept[place, 3] = side * k, side * error


@njit(cache=True)
def _survive(paths: Paths, i: int, feeds_back: bool) -> int:
    """Make the paths kept the old ones of the next column, and return how many there are."""
    alive = 0
    old, new = paths.errors[i & 1], paths.errors[1 - (i & 1)]
    for state in range(len(paths.kept)):
        for cost, parent, pick, error in paths.kept[state]:
            if cost == np.inf:
                break
            paths.costs[alive], paths.states[alive] = cost, state
            paths.parents[i, alive], paths.picks[i, alive] = int(parent), int(pick)
            if feeds_back:
                new[alive, :i] = old[int(parent), :i]
                new[alive, i] = error
            alive += 1
    return alive
