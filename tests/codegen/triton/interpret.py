"""Generated kernels as functions: in Triton's interpreter where TRITON_INTERPRET is set, else on the GPU.

The variable must be set before Triton is imported, so tests that use this run in a process of their own. Where it is
not set and there is a GPU, the same tests run there, compiled: see `tests.codegen.triton.on_gpu`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from sparsec.inspect.interpreted import interpreted, type_of
from sparsec.ir.core import Func
from tests.codegen.triton import on_gpu

__all__ = ["kernel", "type_of"]

FOLDER = tempfile.TemporaryDirectory()


def kernel(func: Func, **constants: int) -> Callable[[Sequence[torch.Tensor | None]], Sequence[torch.Tensor]]:
    """A kernel function as a function of its operands; `constants` replace those that entry points have."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return on_gpu.kernel(func, **constants)
    return interpreted(func, Path(FOLDER.name), constants)
