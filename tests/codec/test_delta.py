from __future__ import annotations

import hashlib
import lzma
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from filterpress.codec import (
    QuantizedTensor,
    apply_delta,
    decode,
    encode,
    make_delta,
    quantize,
    snap,
)
from filterpress.codec.binarisation import encode_tensor
from filterpress.codec.quantizer import from_exponents
from filterpress.errors import BitstreamError

GRAPH = np.random.default_rng(5).bytes(20)


def number(value):
    digits = []
    while value >= 128:
        digits.append(value % 128 + 128)
        value //= 128
    return bytes([*digits, value])


def text(value):
    return number(len(value)) + value


def signed(body):
    return body + hashlib.sha256(body).digest()[:16]


def packed(metadata, **options):
    setting = {"dict_size": 2**22, "lc": 0, "lp": 0, "pb": 0, "nice_len": 273, **options}
    filters = [{"id": lzma.FILTER_LZMA1, **setting}]
    stream = lzma.compress(metadata, lzma.FORMAT_RAW, filters=filters)
    return number(len(metadata)) + text(stream)


def table(*entries):
    """Return metadata with an empty header, without a graph; each is (name, shape, n_bytes)."""
    rows = (
        text(name) + bytes([2 * len(shape)]) + b"".join(map(number, shape)) + number(n_bytes)
        for name, shape, n_bytes in entries
    )
    return text(b"{}") + number(len(entries)) + b"".join(rows)


def forged(old, changes, metadata=b"\0", promised=bytes(16)):
    """Return a delta with a right digest and parts that `make_delta` would not write."""
    return signed(b"FPD\x02" + old[-16:] + promised + metadata + changes)


def tensor(integers, exponents=0):
    return QuantizedTensor(np.array(integers, np.int32), from_exponents(exponents))


def file(graph=b"", header=None, **tensors):
    return encode(tensors, graph, header or {})


def gaussian(shape, scale=0.25, seed=0):
    return quantize(np.random.default_rng(seed).normal(0, 0.5, shape), snap(scale))


def moved(old, share, seed=1):
    random = np.random.default_rng(seed)
    step = random.choice(np.int32([-1, 1]), old.integers.shape)
    moves = random.random(old.integers.shape) < share
    return old._replace(integers=old.integers + step * moves)


WEIGHT, BIAS = gaussian((4, 6), np.linspace(0.1, 0.4, 4)), gaussian((4,))
OLD = file(GRAPH, a=WEIGHT, b=BIAS, gone=gaussian((3, 3)))
NEW = file(GRAPH, {"epoch": 2}, a=moved(WEIGHT, 0.3), b=BIAS, c=gaussian((2, 2)))
DELTA = make_delta(OLD, NEW)

names = st.sampled_from(["a", "b", "c", "ä"])
shapes = st.sampled_from([(), (0,), (3,), (2, 3), (3, 2), (0, 2), (2, 2, 1, 3)])


@st.composite
def tensors(draw):
    shape = draw(shapes)
    elements = st.integers(-3, 3) | st.integers(-(2**20), 2**20)
    per_row = draw(st.booleans()) and len(shape) > 0
    exponents = st.integers(-70, 70) | st.integers(-4096, 4095)
    steps = draw(hnp.arrays(np.int64, shape[:1] if per_row else (), elements=exponents))
    return tensor(draw(hnp.arrays(np.int32, shape, elements=elements)), steps)


@st.composite
def contents(draw):
    """A file's tensors, graph and header, and those of another in which only some are new."""
    first = draw(st.dictionaries(names, tensors(), max_size=4))
    second = first | draw(st.dictionaries(names, tensors(), max_size=4))
    for name in draw(st.sets(names)):
        second.pop(name, None)
    for name in second.keys() & draw(st.sets(names)):
        changed = np.clip(second[name].integers + draw(st.integers(-2, 2)), -(2**20), 2**20)
        second[name] = second[name]._replace(integers=changed.astype(np.int32))
    graphs = draw(st.sampled_from([(b"", b""), (GRAPH, GRAPH), (GRAPH, b"another")]))
    headers = draw(st.sampled_from([({}, {}), ({"a": 1}, {"a": 2})]))
    return zip((first, second), graphs, headers, strict=True)


@given(contents())
@settings(max_examples=200, deadline=None)
def test_a_delta_makes_the_new_file_of_the_old_one_byte_for_byte(pair):
    old, new = (encode(*content) for content in pair)
    delta = make_delta(old, new)
    assert apply_delta(old, delta) == new
    assert len(delta) <= len(new) + 33 + len(decode(new).tensors)


def test_equal_tensors_and_metadata_are_copied():
    assert make_delta(OLD, OLD) == signed(b"FPD\x02" + 2 * OLD[-16:] + b"\0" + b"\0\0\0")


def test_the_documented_layout_is_what_is_written():
    half, moved = (
        np.int32([[0, 0, 2, 5, -7], [4, 0, 0, -6, 8]]),
        np.int32([[0] * 5, [0, 1, 0, 0, 0]]),
    )
    old = file(copied=BIAS, shifted=tensor(2 * half, -64))
    whole, shifted = tensor([7, 7]), tensor(half + moved, 0)
    new = file(copied=BIAS, shifted=shifted, whole=whole)
    change = encode_tensor(moved, np.int32(64))
    kept = encode_tensor(BIAS.integers, np.int32(-128))
    coded = encode_tensor(shifted.integers, np.int32(0))
    other = encode_tensor(whole.integers, np.int32(0))
    entries = (b"copied", (4,), len(kept)), (b"shifted", (2, 5), len(coded))
    metadata = packed(table(*entries, (b"whole", (2,), len(other))))
    assert new == signed(b"FPK\x03" + metadata + kept + coded + other)
    changes = b"\0" + b"\1" + text(change) + b"\2" + other
    written = forged(old, changes, metadata, promised=new[-16:])
    assert apply_delta(old, written) == new
    assert make_delta(old, new) == written


def test_a_delta_of_version_2_is_read_for_ever():
    old = bytes.fromhex(
        "46504b031721000120cc6ce3eb7022849be0209a0bce7d084752425a0371a5ace0ffff2b8c00007f02da1b3382"
        "6b5c28402395a29355278cf60d381483f704f7dd5cc17e01121880739ea6c6a7fb85cef026f6427c1f75"
    )
    delta = bytes.fromhex(
        "4650440280739ea6c6a7fb85cef026f6427c1f7595fa7a94f5330fc5125dbe77af27feae1c25000120cc6cff4c"
        "d89bedd227c42688fc33e4ec16d2784912bcf83a27dcd392be72f8e1bd8001098000006b857f71aa930002802b"
        "9b5b18b9aae4780c14411a9cffd66085de2871"
    )
    integers = np.arange(-18, 18).reshape(2, 2, 3, 3)
    integers[0, 1, 2, 0] += 1
    integers[1, 0, 0, 0] -= 2
    decoded = decode(apply_delta(old, delta))
    expected = {
        "a": tensor(integers, [0, -63]),
        "b": tensor([[1, -2]], -64),
        "c": tensor([7, 0], 5),
    }
    assert decoded.graph == b"graph"
    assert decoded.tensors.keys() == expected.keys()
    for name, (found, scale) in decoded.tensors.items():
        assert np.array_equal(found, expected[name].integers)
        assert np.array_equal(scale, expected[name].scale)


@pytest.mark.parametrize("share", [0.05, 0.2])
def test_moved_weights_cost_at_most_2_percent_more_than_the_entropy_of_the_moves(share):
    layers = {f"layer{n}": gaussian((256, 128, 3, 3), 0.2, seed=n) for n in range(3)}
    old = encode(layers, GRAPH, {})
    new = encode({name: moved(layer, share) for name, layer in layers.items()}, GRAPH, {})
    entropy = -share * np.log2(share) - (1 - share) * np.log2(1 - share) + share
    n_bits = 8 * len(make_delta(old, new))
    assert n_bits < 1.02 * entropy * 3 * layers["layer0"].integers.size
    assert n_bits < 8 * len(new) / 2


def test_weights_on_finer_steps_cost_the_bits_that_are_new():
    weight = np.random.default_rng(0).normal(0, 0.5, (64, 64, 3, 3))
    coarse, fine = (quantize(weight, snap(np.full(64, step))) for step in (0.25, 0.125))
    delta = make_delta(file(w=coarse), file(w=fine))
    n_bits = 8 * len(delta) / weight.size
    # Of the fine integers around a coarse one, the middle has half of the share, either side 1/4.
    assert 1.4 < n_bits < 1.55
    assert n_bits < 0.6 * 8 * len(file(w=fine)) / weight.size


def test_other_steps_alone_cost_nearly_nothing():
    steps = np.random.default_rng(0).integers(-300, -200, 64)
    integers = gaussian((64, 48)).integers
    old, new = file(w=tensor(integers, steps)), file(w=tensor(integers, steps + 1))
    assert len(make_delta(old, new)) < len(new) / 5


def test_a_tensor_whose_change_is_too_large_for_a_tensor_travels_whole():
    integers = np.random.default_rng(0).integers(-(2**20), 2**20, 500)
    integers[7] = -(2**20)
    other = integers.copy()
    other[7] = 1
    old, new = file(w=tensor(integers)), file(w=tensor(other))
    delta = make_delta(old, new)
    assert apply_delta(old, delta) == new
    assert len(delta) > len(new)


def test_an_lzma_stream_that_this_machine_would_not_write_is_kept():
    payload = encode_tensor(np.int32([1, 2]), np.int32(0))
    metadata = table((b"w", (2,), len(payload))) + "".join(map(str, range(300))).encode()
    other = packed(metadata, mode=lzma.MODE_FAST)
    assert other != packed(metadata)
    new = signed(b"FPK\x03" + other + payload)
    assert apply_delta(OLD, make_delta(OLD, new)) == new


def test_a_delta_cut_anywhere_is_refused():
    for length in range(len(DELTA)):
        with pytest.raises(BitstreamError):
            apply_delta(OLD, DELTA[:length])


def test_a_delta_with_any_bit_turned_is_refused():
    for bit in range(8 * len(DELTA)):
        damaged = bytearray(DELTA)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            apply_delta(OLD, bytes(damaged))


def test_a_delta_with_any_bit_turned_under_a_right_digest_is_refused():
    for bit in range(8 * (len(DELTA) - 16)):
        damaged = bytearray(DELTA[:-16])
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            apply_delta(OLD, signed(bytes(damaged)))


def test_a_delta_for_another_file_is_refused_with_both_their_names():
    with pytest.raises(BitstreamError, match=f"{OLD[-16:].hex()}, not {NEW[-16:].hex()}"):
        apply_delta(NEW, DELTA)


def test_a_damaged_old_file_is_refused():
    damaged = OLD[:40] + bytes([OLD[40] ^ 1]) + OLD[41:]
    for job in (lambda: apply_delta(damaged, DELTA), lambda: make_delta(damaged, NEW)):
        with pytest.raises(BitstreamError, match="the file is truncated or damaged"):
            job()


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damage_under_right_digests_gives_the_promised_file_or_an_error(choice):
    body = bytearray(DELTA[:-16])
    for _ in range(choice.draw(st.integers(1, 3))):
        at = choice.draw(st.integers(36, len(body)))
        body[at : at + choice.draw(st.integers(0, 2))] = choice.draw(st.binary(max_size=2))
    try:
        assert apply_delta(OLD, signed(bytes(body)), max_bytes=2**20) == NEW
    except BitstreamError:
        return


PAYLOAD = b"\x12\x34\x56\x78\x9a"
ZEROS = encode_tensor(np.zeros(2, np.int32), np.int32(0))
SMALL = file(w=tensor([1, 2]))
LARGE = file(w=tensor([2**20, 0]))
HUGE = signed(b"FPK\x03" + packed(table((b"w", (1, 2**28), 2))) + ZEROS)


def whole(shape, n_bytes=5):
    return packed(table((b"w", shape, n_bytes)))


HOSTILE = {
    "nothing": (SMALL, b"", "starts differently"),
    "a file instead of a delta": (SMALL, SMALL, "starts differently"),
    "another version": (SMALL, signed(b"FPD\x03" + SMALL[-16:]), "version 2"),
    "nothing but a magic number": (SMALL, signed(b"FPD\x02"), "another file"),
    "no metadata": (SMALL, forged(SMALL, b"", b""), "cut off"),
    "an unknown kind": (SMALL, forged(SMALL, b"\3"), "unknown kind"),
    "no kind": (SMALL, forged(SMALL, b""), "ends"),
    "bytes after the end": (SMALL, forged(SMALL, b"\0\0"), "goes on for 1 bytes"),
    "an unpromised file": (SMALL, forged(SMALL, b"\0"), "promises"),
    "a copy of what is not there": (
        SMALL,
        forged(SMALL, b"\0", packed(table((b"x", (2,), 5)))),
        "old file has none",
    ),
    "a copy of what is shorter": (SMALL, forged(SMALL, b"\0", whole((2,), 99)), "declared"),
    "a change of another shape": (SMALL, forged(SMALL, b"\1\2" + ZEROS, whole((1, 2))), "has none"),
    "a change that is longer than there": (SMALL, forged(SMALL, b"\1\7" + ZEROS), "are left"),
    "a change that is damaged": (SMALL, forged(SMALL, b"\1" + text(PAYLOAD)), "tensor 'w'"),
    "a change of other length than said": (
        SMALL,
        forged(SMALL, b"\1" + text(ZEROS), whole((2,), 9)),
        "9 bytes are declared",
    ),
    "a change out of bounds": (
        LARGE,
        forged(LARGE, b"\1" + text(encode_tensor(np.int32([1, 0]), np.int32(0)))),
        "out of",
    ),
    "a tensor that is cut off": (SMALL, forged(SMALL, b"\2" + PAYLOAD, whole((2,), 9)), "9 bytes"),
    "a tensor beyond any file": (
        SMALL,
        forged(SMALL, b"\2" + PAYLOAD, whole((2,), 2**34)),
        "are declared",
    ),
    "a tensor larger than allowed": (SMALL, forged(SMALL, b"\2", whole((2**20, 2**20))), "allowed"),
    "metadata that is said to be 2 GiB": (
        SMALL,
        forged(SMALL, b"", number(2**31) + text(b"")),
        "of metadata are declared",
    ),
    "the largest tensor allowed and five bytes for its change": (
        HUGE,
        forged(HUGE, b"\1" + text(PAYLOAD)),
        "tensor 'w'",
    ),
}


@pytest.mark.parametrize(("old", "delta", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_forged_delta_is_refused_fast_and_in_little_memory(old, delta, message):
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(BitstreamError, match=message):
        apply_delta(old, delta)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 0.7  # seconds; an honest tensor of this size: minutes
    assert after.ru_maxrss - before.ru_maxrss < 400 * 1024  # KiB


def test_files_over_the_callers_limit_are_refused():
    old, new = file(w=tensor(np.zeros((10, 10)))), file(w=tensor(np.ones((10, 10))))
    delta = make_delta(old, new, max_bytes=400)
    assert apply_delta(old, delta, max_bytes=400) == new
    for job in (make_delta, apply_delta):
        with pytest.raises(BitstreamError, match="take 400 bytes, at most 399"):
            job(old, delta if job is apply_delta else new, max_bytes=399)


def test_deltas_need_neither_torch_nor_onnx():
    code = """
import sys
sys.modules["torch"] = sys.modules["onnx"] = None
from filterpress.codec import apply_delta, encode, make_delta
file = encode({}, b"", {})
print(apply_delta(file, make_delta(file, file)) == file)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"
