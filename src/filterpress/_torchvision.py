"""torchvision, also beside a torch without CUDA.

The wheels of torchvision on PyPI are built for torch with CUDA. Beside a CPU-only torch their
compiled library does not load, its operators do not exist, and ``import torchvision`` stops at
``operator torchvision::nms does not exist``, although networks, data sets and transforms need none
of them. Declaring the two operators, without an implementation, before the import is enough.

Import this module where torchvision is needed, in the function that needs it: it takes a second.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def _library_loads() -> bool:
    """Say whether the compiled operators of torchvision load, or torchvision is missing anyway."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True
    try:
        for library in sorted(Path(spec.origin).parent.glob("_C*.so")):
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError:
        return False
    return True


if not _library_loads():
    # The declarations live as long as this object does.
    _DECLARATIONS = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for _name in ("nms", "qnms"):
        _DECLARATIONS.define(  # type: ignore[no-untyped-call]
            f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )

import torchvision  # noqa: E402 (after the declarations)

__all__ = ["torchvision"]
