"""A slow coder of one tensor, written from docs/bitstream.md: it shares no code with the other."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import isqrt

import numpy as np


def power_of_two(eighths):
    """2**(eighths / 256), rounded down to a multiple of 2**-52."""
    whole, part = divmod(eighths, 256)
    root = 2 ** (part + 52 * 256)
    for _ in range(8):
        root = isqrt(root)
    return Fraction(root * 2**whole, 2**52)


def beginning(level):
    """The least magnitude of a level."""
    return Fraction(level if level < 4 else (4 + level % 4) * 2 ** (level // 4 - 1), 32)


def level_of(x):
    """The level of x / 32, for whole x."""
    octave = x.bit_length() - 1
    return x if x < 4 else 4 * (octave - 1) + (x >> (octave - 2)) % 4


def shift_of(level):
    return max(level - 18, 0) // 4


@cache
def tail(n, level):
    exponent = (2 * n - 1) * 256 / max(beginning(level), Fraction(1, 32))
    return Fraction((2**113 // int(2**52 * (1 + power_of_two(int(exponent))))), 2**60)


@cache
def first_guess(kind, level, shift, n):
    """The probability of a one, in 2**-24, of a context that begins with one."""
    unit = 2**shift
    start = 1 + n * unit if kind == "upper" else 1 + (n - 1) * unit
    if kind == "greater" and n == 0:
        return min(max(int(tail(1, level) * 2**24), 2**15), 2**24 - 2**15)
    level = max(level, 10)
    if kind == "greater":
        share = tail(start + unit, level) / max(tail(start, level), Fraction(1, 2**60))
    else:
        whole = tail(start, level) - tail(start + unit, level)
        half = tail(start + unit // 2, level) - tail(start + unit, level)
        share = half / max(whole, Fraction(1, 2**60))
    return min(max(int(share * 2**24), 2**15), 2**24 - 2**15)


class SlowCoder:
    """The interval as one big integer: no carries, no buffers."""

    def __init__(self):
        self.low, self.width, self.n_bytes, self.models = 0, 2**32, 0, {}

    def bit(self, context, bit):
        self.between(context, context, 0, bit)

    def between(self, here, there, part, bit):
        near, far = (self.ones_of(context) for context in (here, there))
        zeros = self.width * (2**24 - (near + (far - near) * part // 256)) // 2**24
        self.divide(zeros, bit)
        target = 2**24 - 2**12 if bit else 2**12
        nearer = here if part < 128 else there
        ones, count = self.models[nearer]
        ones += (target - ones) * (2**16 // (count + 2)) // 2**16
        self.models[nearer] = ones, min(count + 1, 598)

    def ones_of(self, context):
        if context not in self.models:
            kind, where = context[1], context[2:]
            told = kind in ("greater", "upper")
            one = first_guess(kind, *where[-3:]) if told else 2**23
            self.models[context] = one, 32 if told else 0
        return self.models[context][0]

    def even(self, n_bits, value):
        part = self.width // 2**n_bits
        self.low += value * part
        self.width = part if value < 2**n_bits - 1 else self.width - value * part
        self.widen()

    def divide(self, zeros, bit):
        self.low, self.width = (self.low + zeros, self.width - zeros) if bit else (self.low, zeros)
        self.widen()

    def widen(self):
        while self.width < 2**24:
            self.low, self.width, self.n_bytes = self.low * 256, self.width * 256, self.n_bytes + 1

    def finish(self):
        for n in range(5):
            unit = 256 ** (4 - n)
            value = -(-self.low // unit) * unit
            if value < self.low + self.width:
                return (value // unit).to_bytes(self.n_bytes + n, "big")
        raise AssertionError


def slow_integer(coder, part, largest, expected, prediction, value):
    """Code an integer of an expected magnitude in 2**-13."""
    level, magnitude = level_of(expected // 256), abs(value)
    shift, start = shift_of(level), int(beginning(level) * 2**13)
    way = (expected - start) * 256 // (int(beginning(level + 1) * 2**13) - start)

    def bit(kind, n, value, agreement=0):
        here, there = ((part, kind, agreement, lv, shift, n) for lv in (level, level + 1))
        coder.between(here, there, way, int(value))

    bit("greater", 0, magnitude > 0)
    if magnitude == 0:
        return
    strength = sum(2**13 * abs(prediction) > expected * 2**n for n in range(3))
    differs = int((value < 0) != (prediction < 0))
    coder.bit((part, "sign", strength), differs)
    agreement = 0 if strength == 0 else 1 + differs if strength == 1 else 3 + differs
    units, place = divmod(magnitude - 1, 2**shift)
    for n in range(1, 15 if largest == 15 else (largest - 1) // 2**shift + 1):
        bit("greater", n, units >= n, agreement)
        if units < n:
            break
    if units >= 14:
        digits = bin(units - 14 + 1)[3:]
        for n in range(min(len(digits) + 1, 20)):
            coder.bit((part, "length", n), int(n < len(digits)))
        coder.even(len(digits), int(digits or "0", 2))
    if shift:
        half = 2 ** (shift - 1)
        bit("upper", min(units, 14), place // half)
        coder.even(shift - 1, place % half)


def slow_steps(coder, exponents):
    mean = sum(exponents) // len(exponents) if exponents else -4096
    coder.even(13, mean + 4096)
    if len(exponents) > 1:
        rows = np.array([exponents]) - mean
        flags = np.zeros(1, bool), np.zeros(rows.size, bool)
        slow_matrix(coder, "steps", rows, 15, 34, (4, 4, 4), 1, 1, *flags)


def slow_zeros(coder, part, zeros, period):
    coder.bit((part, "any"), int(any(zeros)))
    if any(zeros):
        for i, zero in enumerate(zeros):
            before = i > 0 and zeros[i - 1]
            earlier = i >= period and zeros[i - period]
            coder.bit((part, "zero", bool(before), bool(earlier)), int(zero))


def slow_encode(integers, exponents, name_zeros=True, level=None, largest=None, trusts=None):
    coder = SlowCoder()
    slow_steps(coder, exponents.reshape(-1).tolist())
    if largest is None:
        largest = min(int(np.abs(integers).max(initial=0)), 15)
    coder.even(4, largest)
    if largest == 0:
        return coder.finish()
    one_row = integers.ndim < 2 or integers.size == len(integers)
    rows = integers.reshape(1 if one_row else len(integers), -1)
    taps = int(np.prod(integers.shape[2:]))
    width = integers.shape[-1] if integers.ndim > 2 else 1
    zero_rows, zero_columns = ~rows.any(axis=1), ~rows.any(axis=0)
    if not name_zeros:
        zero_rows[:], zero_columns[:] = False, False
    n_weights = int((~zero_rows).sum() * (~zero_columns).sum())
    if level is None:
        level = level_of(32 * int(np.abs(rows.astype(np.int64)).sum()) // n_weights)
    coder.even(7, level)
    if trusts is None:
        trusts = slow_trusts(rows, taps, zero_rows, zero_columns)
    if len(rows) > 1:
        for trust in trusts if taps > 1 else trusts[:2]:
            coder.even(3, trust - 2)
    slow_zeros(coder, "rows", zero_rows, 1)
    slow_zeros(coder, "columns", zero_columns, taps)
    shape = taps, width, zero_rows, zero_columns
    slow_matrix(coder, "weights", rows, largest, level, trusts, *shape)
    return coder.finish()


def slow_trusts(rows, taps, zero_rows, zero_columns):
    """How far the strengths of rows, columns and channels are believed."""
    if len(rows) == 1:
        return 9, 9, 9
    q = abs(rows.astype(object))
    r, c = (np.flatnonzero(~zeros).tolist() for zeros in (zero_rows, zero_columns))
    weights = [q[i, j] for i in r for j in c]
    total = sum(weights)
    variance = len(weights) * sum(q * q for q in weights) - total**2
    of_rows = [sum(q[i, j] for j in c) for i in r]
    of_columns = [sum(q[i, j] for i in r) for j in c]
    members = [[k for k, j in enumerate(c) if j // taps == m] for m in range(q.shape[1] // taps)]
    members = [channel for channel in members if channel]
    of_channels = [sum(of_columns[k] for k in channel) for channel in members]

    def trust(sums, expected, n_means):
        deviation = sum(abs(256 * x - y) for x, y in zip(sums, expected, strict=True))
        n = len(weights) // len(sums)
        chance = 7 * 2**16 * (len(sums) - n_means) * variance
        excess = 11 * deviation**2 * n * len(sums) - chance
        if excess <= 0:
            return 9
        ratio = 3 * chance * n // (2 * excess)
        return min(max(ratio.bit_length() - 1, 2), 9)

    mean = 256 * total // len(c)
    of_rows = trust(of_rows, [256 * total // len(r)] * len(r), 1)
    if taps == 1:
        return of_rows, trust(of_columns, [mean] * len(c), 1), 9
    expected = {
        k: 256 * x // len(channel)
        for channel, x in zip(members, of_channels, strict=True)
        for k in channel
    }
    of_columns = trust(of_columns, [expected[k] for k in range(len(c))], len(members))
    return of_rows, of_columns, trust(of_channels, [mean * len(m) for m in members], 1)


def shrunk(total, n, prior, trust):
    return (prior * 2**trust + total * 2**13) // (2**trust + n)


def slow_matrix(coder, part, rows, largest, level, trusts, taps, width, zero_rows, zero_columns):
    q, unit, most = rows.tolist(), 2**13, 2**46
    row_trust, column_trust, channel_trust = trusts
    mean = int((beginning(level) + beginning(level + 1)) * unit / 2)
    columns, n_channels = [0] * rows.shape[1], -(-rows.shape[1] // taps)
    channels = [0] * n_channels
    widths = [int((~zero_columns[m * taps : (m + 1) * taps]).sum()) for m in range(n_channels)]
    for n_rows, r in enumerate(np.flatnonzero(~zero_rows).tolist()):
        seen = foreseen = mean * 2**row_trust
        strengths = [mean] * n_channels
        if taps > 1:
            strengths = [
                shrunk(total, n_rows * n, mean, channel_trust)
                for total, n in zip(channels, widths, strict=True)
            ]
        for c in np.flatnonzero(~zero_columns).tolist():
            y, x = divmod(c % taps, width)
            of_column = shrunk(columns[c], n_rows, strengths[c // taps], column_trust)
            plain = min(seen * 2**12 // foreseen, 2**28) * of_column // 2**12
            left = q[r][c - 1] if x else None
            above = q[r][c - width] if y else None
            corner = q[r][c - width - 1] if x and y else 0
            before = q[r - 1][c] if r else None
            back = q[r][c - taps] if c >= taps else None
            near = sum(plain if q is None else abs(q) * unit for q in (left, above, before, back))
            expected = min((60 * plain + near) // 64, 2**33)
            prediction = 2 * (left or 0) + 2 * (above or 0) - corner
            slow_integer(coder, part, largest, expected, prediction, q[r][c])
            magnitude = abs(q[r][c])
            seen = min(seen + magnitude * unit, most)
            foreseen = min(foreseen + of_column, most)
            columns[c] = min(columns[c] + magnitude, most)
            channels[c // taps] = min(channels[c // taps] + magnitude, most)
