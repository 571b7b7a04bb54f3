"""Runs generated kernels in Triton's interpreter, through the runtime's own launcher; without it, on the GPU.

TRITON_INTERPRET must be set before Triton is imported, so tests that use this run in a process of their own. Where it
is not set and there is a GPU, the same tests run there, compiled: see `tests.codegen.triton.on_gpu`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsec.codegen.triton.compile import load_module
from sparsec.codegen.triton.emit import sketch_kernel
from sparsec.ir.core import Func, Value
from sparsec.ir.types import Sym, TensorType
from sparsec.runtime import plan
from sparsec.runtime.dtypes import DTYPES as ELEMENTS
from sparsec.runtime.tensor_maps import TensorMap
from sparsec.runtime.triton_kernels import launcher
from tests.codegen.triton import on_gpu

DTYPES = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16, "*i32": torch.int32}
FOLDER = tempfile.TemporaryDirectory()


def kernel(func: Func, **constants: int) -> Callable[[Sequence[torch.Tensor | None]], Sequence[torch.Tensor]]:
    """A kernel function as a function of its operands; `constants` replace those that entry points have."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return on_gpu.kernel(func, **constants)
    sketch = sketch_kernel(func)
    _let_loops_run()
    name = "generated_" + hashlib.sha256(sketch.source.encode()).hexdigest()[:16]
    path = Path(FOLDER.name, f"{name}.py")
    path.write_text(sketch.source)
    module = load_module(name, path)

    def load(config: Any) -> Any:
        function = getattr(module, config["symbol"])

        def launch(grid: tuple[int, int], args: Sequence[Any]) -> None:
            # Scratch comes as bytes: a GPU sees addresses only, the interpreter wants to know the element type.
            typed = [_typed(arg, type) for arg, type in zip(args, config["types"], strict=True)]
            function[grid](*typed, **config["constants"])

        return launch

    variants = [
        plan.Variant(
            schedule.up_to,
            {
                "scratch": list(schedule.scratch),
                "state": list(schedule.state),
                "launches": [
                    {
                        "symbol": entry.name,
                        "grid": list(entry.grid),
                        "args": [_argument(parameter.argument) for parameter in entry.parameters],
                        "types": [parameter.type for parameter in entry.parameters],
                        "constants": {n: constants.get(n, value) for n, value in entry.constants.items()},
                    }
                    for entry in schedule.entries
                ],
            },
        )
        for schedule in sketch.schedules
    ]
    op = func.body.ops[0]
    params = tuple(type_of(value.type) if isinstance(value, Value) else None for value in op.arguments)
    results = tuple(type_of(value.type) for value in op.results)
    fixed = func.attrs["tokens"]
    tokens = fixed if isinstance(fixed, int) and not isinstance(fixed, bool) else "t"
    described = plan.Kernel(
        name=func.name, op=op.name, backend="triton", params=params, results=results, tokens=tokens, attrs={},
        regions={}, variants=variants,
    )  # fmt: skip
    return launcher(described, torch.device("cpu"), load, sms=3)


@cache
def _let_loops_run() -> None:
    """Loops over sizes that a kernel loads: NumPy 2.4 takes no array of one element for an integer, as Triton 3.6 has
    it, and the counter is a plain integer there, which `tl.constexpr` does not divide."""
    import triton.language as tl
    from triton.runtime import interpreter

    module: Any = interpreter
    patch = module._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    module._patch_lang_tensor = patched
    constant: Any = tl.constexpr
    constant.__rmod__ = lambda self, other: other % self.value


def _argument(argument: Mapping[str, Any]) -> dict[str, Any]:
    """An argument; of maps, boxes as large as the blocks."""
    return {**argument, "box": argument["block"], "swizzle": 0} if "map" in argument else dict(argument)


def _typed(arg: Any, type: str) -> Any:
    if isinstance(arg, TensorMap):
        from triton.tools.tensor_descriptor import TensorDescriptor

        base = arg.tensor.view(ELEMENTS[arg.element]) if arg.tensor.dtype is torch.uint8 else arg.tensor
        block = [int(side) for side in type[type.index("[") + 1 : type.index("]")].split(",")]
        return TensorDescriptor(base, list(arg.shape), list(arg.strides), block)
    if type == "*u8":
        return arg.view(torch.uint8)
    return arg.view(DTYPES[type]) if type in DTYPES and arg.dtype is torch.uint8 else arg


def type_of(type: Any) -> plan.Tensor:
    assert isinstance(type, TensorType)
    return plan.Tensor(tuple(str(dim) if isinstance(dim, Sym) else dim for dim in type.shape), type.dtype.value)
