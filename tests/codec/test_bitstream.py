from __future__ import annotations

import hashlib
import json
import lzma
import resource
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from filterpress.codec import QuantizedTensor, decode, encode, quantize, snap, stream
from filterpress.codec.binarisation import encode_tensor
from filterpress.codec.quantizer import from_exponents
from filterpress.errors import BitstreamError

LZMA = [{"id": lzma.FILTER_LZMA1, "dict_size": 2**22, "lc": 0, "lp": 0, "pb": 0, "nice_len": 273}]


def quantized(shape, scale=0.25, seed=0):
    return quantize(np.random.default_rng(seed).normal(0, 0.5, shape), snap(scale))


TENSORS = {
    "fc.weight": quantized((4, 6), np.linspace(0.1, 0.4, 4)),
    "fc.bias": quantized((4,)),
    "conv": quantized((3, 2, 3, 3)),
}
HEADER = {"format": 1, "classes": ["cat", "dög"], "accuracy": 0.5, "none": None}
ZEROS = encode_tensor(np.zeros(2, np.int32), np.int32(0))
FILE = encode(TENSORS, b"a graph", HEADER)


def assert_equal(decoded, tensors):
    assert decoded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert decoded[name].integers.dtype == np.int32
        assert decoded[name].scale.dtype == np.float32
        assert np.array_equal(decoded[name].integers, tensor.integers)
        assert decoded[name].integers.shape == tensor.integers.shape
        assert np.array_equal(decoded[name].scale, tensor.scale)
        assert decoded[name].scale.shape == tensor.scale.shape


def number(value):
    digits = []
    while value >= 128:
        digits.append(value % 128 + 128)
        value //= 128
    return bytes([*digits, value])


def text(value):
    return number(len(value)) + value


def entry(name=b"w", shape=(2,), n_bytes=0, per_row=0):
    kind = bytes([2 * len(shape) + per_row])
    return text(name) + kind + b"".join(map(number, shape)) + number(n_bytes)


def signed(body):
    return body + hashlib.sha256(body).digest()[:16]


def forged(header=b"{}", table=b"\0", graph=b"", payload=b"", packed=None, length=None):
    """Return a file with a right digest around parts that `encode` would not write."""
    metadata = text(header) + table + graph
    packed = lzma.compress(metadata, lzma.FORMAT_RAW, filters=LZMA) if packed is None else packed
    length = len(metadata) if length is None else length
    return signed(b"FPK\x03" + number(length) + text(packed) + payload)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e9, 1e9) | names
headers = st.dictionaries(names, st.recursive(scalars, st.lists, max_leaves=5), max_size=4)


@st.composite
def tensors(draw):
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
    elements = st.integers(-3, 3) | st.integers(-(2**20), 2**20)
    integers = draw(hnp.arrays(np.int32, shape, elements=elements))
    per_row = draw(st.booleans()) and len(shape) > 0
    exponents = hnp.arrays(
        np.int64, shape[:1] if per_row else (), elements=st.integers(-4096, 4095)
    )
    return QuantizedTensor(integers, from_exponents(draw(exponents)))


@given(st.dictionaries(names, tensors(), max_size=4), st.binary(max_size=50), headers)
@settings(max_examples=100, deadline=None)
def test_what_is_encoded_is_decoded(contents, graph, header):
    decoded = decode(encode(contents, graph, header))
    assert_equal(decoded.tensors, contents)
    assert decoded.graph == graph
    assert decoded.header == header


def test_the_order_of_tensors_and_keys_does_not_matter():
    turned = dict(reversed(TENSORS.items())), b"a graph", dict(reversed(HEADER.items()))
    assert encode(*turned) == FILE
    assert list(decode(FILE).tensors) == ["conv", "fc.bias", "fc.weight"]


def test_strided_and_read_only_tensors_are_encoded_as_they_are():
    tensor = quantized((6, 8))
    turned = QuantizedTensor(tensor.integers.T, tensor.scale)
    turned.integers.flags.writeable = False
    assert_equal(decode(encode({"w": turned}, b"", {})).tensors, {"w": turned})


def test_a_stream_gives_what_decode_gives_in_its_order():
    read = stream(FILE)
    assert (read.header, read.graph) == (HEADER, b"a graph")
    names, tensors = zip(*read.tensors, strict=True)
    assert list(names) == sorted(TENSORS)
    assert_equal(dict(zip(names, tensors, strict=True)), TENSORS)


def test_a_stream_checks_the_file_before_its_first_tensor():
    for damaged in (FILE[:-1], FILE[:40] + b"?" + FILE[41:]):
        with pytest.raises(BitstreamError, match="digest"):
            stream(damaged)
    with pytest.raises(BitstreamError, match="allowed"):
        stream(FILE, max_bytes=100)


def test_a_stream_takes_memory_for_one_tensor_and_decode_for_all():
    n, n_bytes = 16, 4 * 2**18
    few = QuantizedTensor(np.eye(2**9, dtype=np.int32), snap(np.float32(1)))
    file = encode({f"w{i}": few for i in range(n)}, b"", {})

    def peak(read):
        tracemalloc.start()
        kept = read(file)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert kept is not None
        return most

    peak(decode)  # compiles and caches
    assert peak(lambda data: [t.integers[0, 0] for _, t in stream(data).tensors]) < 6 * n_bytes
    assert peak(decode) > n * n_bytes


def test_the_documented_layout_is_what_is_written():
    payload = bytes.fromhex("7400")
    expected = forged(b'{"a":1}', b"\1" + entry(b"w", (3, 4), len(payload)), b"G", payload)
    step = QuantizedTensor(np.zeros((3, 4), np.int32), from_exponents(-384))
    assert encode({"w": step}, b"G", {"a": 1}) == expected


def test_a_file_of_version_3_is_read_for_ever():
    file = bytes.fromhex(
        "46504b030f19000120cc6cdea42600303ae778833dae3edb9f63fffb7aa0007e01121829"
        "53271cb473d91cf98bb7c523362f73"
    )
    assert_equal(decode(file).tensors, {"w": QuantizedTensor(np.int32([[1, -2]]), snap([0.5]))})
    assert decode(file).graph == b"graph"


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (QuantizedTensor(np.int64([1]), snap(1)), "must be int32"),
        (QuantizedTensor(np.zeros([1] * 6, np.int32), snap(1)), "up to 5 dimensions"),
        (QuantizedTensor(np.int32([2**20 + 1]), snap(1)), "within"),
        (QuantizedTensor(np.int32([-(2**31)]), snap(1)), "within"),
        (QuantizedTensor(np.int32([1, 2]), snap([1, 1, 1])), "must have shape"),
        (QuantizedTensor(np.int32([1]), np.float32(0.3)), "grid"),
    ],
)
def test_tensors_outside_the_format_are_not_encoded(tensor, message):
    with pytest.raises(ValueError, match=message):
        encode({"w": tensor}, b"", {})


@pytest.mark.parametrize("header", [{"a": float("nan")}, {1: 2}, {"a": (1, 2)}])
def test_headers_that_would_come_back_different_are_not_encoded(header):
    with pytest.raises(ValueError, match="JSON"):
        encode({}, b"", header)


def test_a_file_cut_anywhere_is_refused():
    for length in range(len(FILE)):
        with pytest.raises(BitstreamError):
            decode(FILE[:length])


def test_a_file_with_any_bit_turned_is_refused():
    for bit in range(8 * len(FILE)):
        damaged = bytearray(FILE)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BitstreamError):
            decode(bytes(damaged))


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused(data, with_magic):
    with pytest.raises(BitstreamError):
        decode(b"FPK\x03" + data if with_magic else data)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_damage_under_a_right_digest_gives_an_error_or_a_valid_file(choice):
    body = bytearray(FILE[:-16])
    for _ in range(choice.draw(st.integers(1, 3))):
        at = choice.draw(st.integers(4, len(body)))
        body[at : at + choice.draw(st.integers(0, 2))] = choice.draw(st.binary(max_size=2))
    try:
        decoded = decode(signed(bytes(body)), max_bytes=2**20)
    except BitstreamError:
        return
    assert_equal(decode(encode(*decoded)).tensors, decoded.tensors)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_metadata_under_a_right_digest_gives_an_error_or_a_valid_file(choice):
    rows = encode_tensor(np.zeros((3, 4), np.int32), np.zeros(3, np.int32))
    first, second = entry(b"a", (3, 4), len(rows), 1), entry(b"b", (2, 0, 5), len(ZEROS))
    table = bytearray(b"\2" + first + second)
    at = choice.draw(st.integers(0, len(table)))
    table[at : at + choice.draw(st.integers(0, 2))] = choice.draw(st.binary(max_size=3))
    try:
        decoded = decode(forged(table=bytes(table), payload=rows + ZEROS), max_bytes=2**20)
    except BitstreamError:
        return
    assert_equal(decode(encode(*decoded)).tensors, decoded.tensors)


PAYLOAD = b"\x12\x34\x56\x78\x9a"
SOME_ROWS = encode_tensor(np.tile(np.int32([[1, 1], [0, 0]]), (40, 1)), np.int32(0))
HOSTILE = {
    "a table that promises more entries than there are": forged(table=number(2**34) + entry()),
    "a tensor larger than allowed": forged(
        table=b"\1" + entry(shape=(2**20, 2**20), n_bytes=5), payload=PAYLOAD
    ),
    "dimensions whose product overflows": forged(
        table=b"\1" + entry(shape=(2**34,) * 5, n_bytes=5), payload=PAYLOAD
    ),
    "an empty tensor with a huge dimension": forged(
        table=b"\1" + entry(shape=(0, 2**34, 2**34), n_bytes=5), payload=PAYLOAD
    ),
    "the largest tensor allowed and five bytes for it": forged(
        table=b"\1" + entry(shape=(1, 2**28), n_bytes=5), payload=PAYLOAD
    ),
    "as many rows as allowed and five bytes for them": forged(
        table=b"\1" + entry(shape=(2**27, 2), n_bytes=5), payload=PAYLOAD
    ),
    "as many rows as allowed, some of them zero": forged(
        table=b"\1" + entry(shape=(2**27, 2), n_bytes=len(SOME_ROWS)), payload=SOME_ROWS
    ),
    "as many steps as allowed and five bytes for them": forged(
        table=b"\1" + entry(shape=(2**28,), n_bytes=5, per_row=1), payload=PAYLOAD
    ),
    "a payload that is longer than said": forged(table=b"\1" + entry(n_bytes=4), payload=PAYLOAD),
    "a payload that is shorter than said": forged(table=b"\1" + entry(n_bytes=6), payload=PAYLOAD),
    "a payload beyond any file": forged(table=b"\1" + entry(n_bytes=2**34), payload=PAYLOAD),
    "an empty file but for a payload": forged(payload=PAYLOAD),
    "six dimensions": forged(table=b"\1" + text(b"w") + bytes([12, 1, 1, 1, 1, 1, 1, 0])),
    "steps for the rows of a scalar": forged(table=b"\1" + text(b"w") + bytes([1, 0])),
    "a name twice": forged(table=b"\2" + 2 * entry(n_bytes=2), payload=2 * ZEROS),
    "names out of order": forged(
        table=b"\2" + entry(b"b", n_bytes=2) + entry(b"a", n_bytes=2), payload=2 * ZEROS
    ),
    "a name that is no UTF-8": forged(table=b"\1" + entry(b"\xff")),
    "a name longer than the file": forged(table=b"\1" + number(2**34) + b"w"),
    "a number with a needless byte": forged(table=b"\x80\0"),
    "a number without an end": forged(table=b"\xff" * 9),
    "no table": forged(table=b""),
    "no header": forged(header=b""),
    "a header that is no object": forged(header=b"[]"),
    "a header with spaces": forged(header=b'{"a": 1}'),
    "a header out of order": forged(header=b'{"b":1,"a":1}'),
    "a header with a key twice": forged(header=b'{"a":1,"a":1}'),
    "a header that ends early": forged(header=b'{"a":'),
    "a header that is no UTF-8": forged(header=b'{"\xff":1}'),
    "a header with half a character": forged(header=b'{"a":"\\ud800"}'),
    "a header with NaN": forged(header=b'{"a":NaN}'),
    "a header with an infinite number": forged(header=b'{"a":1e999}'),
    "a header with a number of 5000 digits": forged(header=b'{"a":' + b"9" * 5000 + b"}"),
    "a header nested 100000 deep": forged(header=b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "metadata that is said to be 2 GiB": forged(length=2**31),
    "metadata that is said to be a byte longer": forged(table=b"\0", length=5),
    "metadata that is no LZMA": forged(packed=b"\xff" * 40, length=40),
    "metadata with bytes after it": forged(
        packed=lzma.compress(b"\2{}\0", lzma.FORMAT_RAW, filters=LZMA) + b"\0", length=4
    ),
    "metadata that is cut off": forged(
        packed=lzma.compress(b"\2{}\0", lzma.FORMAT_RAW, filters=LZMA)[:-4], length=4
    ),
    "metadata longer than the file": signed(b"FPK\x03" + number(9) + number(2**34)),
    "another version": signed(b"FPK\x02" + FILE[4:-16]),
    "nothing but a magic number": signed(b"FPK\x03"),
    "nothing": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_forged_file_is_refused_fast_and_in_little_memory(data):
    before = resource.getrusage(resource.RUSAGE_SELF)
    with pytest.raises(BitstreamError):
        decode(data)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < 0.7  # seconds; an honest file of this size: minutes
    assert after.ru_maxrss - before.ru_maxrss < 400 * 1024  # KiB


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HOSTILE["a name twice"], "not in order"),
        (HOSTILE["names out of order"], "not in order"),
        (HOSTILE["metadata that is said to be 2 GiB"], "2147483648 bytes of metadata"),
        (HOSTILE["dimensions whose product overflows"], "are allowed"),
        (HOSTILE["a payload that is longer than said"], "should take 4 bytes, but 5 are there"),
        (HOSTILE["another version"], "version 3"),
    ],
)
def test_the_error_says_what_is_wrong(data, message):
    with pytest.raises(BitstreamError, match=message):
        decode(data)


def test_metadata_that_expands_far_beyond_its_size_is_not_expanded():
    packed = lzma.compress(bytes(60 * 2**20), lzma.FORMAT_RAW, filters=LZMA)
    tracemalloc.start()
    try:
        with pytest.raises(BitstreamError, match="not of the size declared"):
            decode(forged(packed=packed, length=100))
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_an_honest_file_over_the_callers_limit_is_refused():
    tensor = QuantizedTensor(np.zeros((100, 100), np.int32), snap(1))
    file = encode({"w": tensor}, b"", {})
    assert_equal(decode(file, max_bytes=40_000).tensors, {"w": tensor})
    with pytest.raises(BitstreamError, match="take 40000 bytes, at most 39999"):
        decode(file, max_bytes=39_999)


def test_an_error_in_a_tensor_names_the_tensor():
    file = forged(table=b"\1" + entry(b"layer1", (9,), n_bytes=5), payload=PAYLOAD)
    with pytest.raises(BitstreamError, match="layer1"):
        decode(file)


def test_the_codec_needs_neither_torch_nor_onnx():
    code = """
import sys
sys.modules["torch"] = sys.modules["onnx"] = None
import numpy as np
from filterpress.codec import decode, encode, quantize, snap
print(decode(encode({"w": quantize(np.ones(3), snap(0.5))}, b"", {})).tensors["w"].integers)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[2 2 2]\n"


def test_onnx_graphs_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; import filterpress.codec.graph"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_header_is_stored_as_canonical_json():
    canonical = json.dumps(HEADER, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert encode({}, b"", HEADER) == forged(header=canonical.encode())
