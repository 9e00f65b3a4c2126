"""What a network is expected to answer: images made of a seed, and its outputs for them.

A publisher and a vehicle make the same images without sending them, and the vehicle compares.
"""

from __future__ import annotations

import hashlib
from math import prod

import numpy as np
from numpy.typing import NDArray

_WORDS = 8  # of 32 bits, in a digest of SHA-256


def images(seed: int, count: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Make images that are the same on every machine.

    Value ``i`` of image ``n``, in the order of memory, is ``u / 2**31 - 1``, where ``u`` is the
    big-endian word ``i % 8`` of the SHA-256 digest of ``"<seed>:<n>:<i // 8>"``.

    Args:
        seed: Of the images.
        count: Number of images.
        shape: Of one image, such as (channels, height, width).

    Returns:
        Images ``(count, *shape)``, uniform in [-1, 1].

    Example:
        >>> images(0, 2, (1, 2, 2)).shape
        (2, 1, 2, 2)
    """
    n_blocks = -(-prod(shape) // _WORDS)
    digests = b"".join(
        hashlib.sha256(f"{seed}:{n}:{block}".encode()).digest()
        for n in range(count)
        for block in range(n_blocks)
    )
    words = np.frombuffer(digests, ">u4").reshape(count, n_blocks * _WORDS)[:, : prod(shape)]
    return (words / 2**31 - 1).astype(np.float32).reshape(count, *shape)


def outputs(model: bytes, seed: int, count: int) -> list[list[float]]:
    """Run a network on images made of a seed, one at a time, on the processor.

    Args:
        model: ONNX model with one input ``(N, *shape)``, as `filterpress.codec.graph.to_onnx`
            makes it.
        seed: Of the images.
        count: Number of images.

    Returns:
        The values of the first output for each image, of float32: each is the shortest number that
        rounds to it, so that its text is short.

    Raises:
        ValueError: The model has not one input with fixed sizes after the first.
    """
    import onnxruntime  # here: it takes a while to load, and images need it not

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    if len(inputs) != 1 or not all(isinstance(size, int) for size in inputs[0].shape[1:]):
        raise ValueError(
            "model must have one input with fixed sizes after the first, got "
            f"{[entry.shape for entry in inputs]}"
        )
    (entry,) = inputs
    made = images(seed, count, tuple(entry.shape[1:]))
    answers = [session.run(None, {entry.name: image[None]})[0] for image in made]
    return [
        np.asarray(answer, np.float32).ravel().astype(str).astype(float).tolist()
        for answer in answers
    ]
