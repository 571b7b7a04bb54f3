"""Generated Triton kernels without a GPU: run by Triton's interpreter, through the runtime's own launcher.

    TRITON_INTERPRET=1 python -m sparsec.inspect.interpreted FOLDER CALL ...

reads `module.sparsec` and each call's operands (`CALL.in.safetensors`, named by their number) in FOLDER, and writes its
results beside them (`CALL.out.safetensors`); a call is a number and the kernel's name, `0.gather_gemm_0`. The variable
must be set before Triton is imported, so this is a process of its own. The interpreter does not know bf16 and is slow:
small shapes, in f32 or f16. Programs run in a mixed order on memory that is poisoned and fenced (`strictness`).
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsec.codegen.triton.compile import load_module
from sparsec.codegen.triton.emit import sketch_kernel
from sparsec.codegen.triton.launch import Entry
from sparsec.diagnostics import SparsecError
from sparsec.inspect.strictness import fenced, poisoned, shuffle_programs
from sparsec.ir.core import Func, Value
from sparsec.ir.types import Sym, TensorType
from sparsec.runtime import plan
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.tensor_maps import TensorMap
from sparsec.runtime.triton_kernels import launcher

MULTIPROCESSORS = 3
"""Of the GPU that is made believe: few, so that persistent kernels go round more than once."""

_POINTERS = {"*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16, "*i32": torch.int32}


def main(folder: Path, calls: Sequence[str]) -> None:
    """Run kernels on operands that lie in `folder`. Raises: SparsecError, as of `interpreted`."""
    from safetensors.torch import load_file, save_file

    from sparsec.ir.parser import parse_module

    module = parse_module((folder / "module.sparsec").read_text(encoding="utf-8"), "module.sparsec")
    with tempfile.TemporaryDirectory(prefix="sparsec-") as sources:
        for call in calls:
            func = module.funcs[call.partition(".")[2]]
            given = load_file(folder / f"{call}.in.safetensors")
            places = [str(i) for i in range(len(func.body.ops[0].arguments))]
            made = interpreted(func, Path(sources))([given.get(place) for place in places])
            found = {str(i): value.contiguous() for i, value in enumerate(made)}
            save_file(found, folder / f"{call}.out.safetensors")


def interpreted(
    func: Func, folder: Path, constants: Mapping[str, int] | None = None
) -> Callable[[Sequence[Tensor | None]], Sequence[Tensor]]:
    """A kernel function as a function of its operands, lists laid flat, holes as None.

    Args:
        folder: where the generated module is written, which Triton reads back.
        constants: in the place of those that entry points have.

    Raises: SparsecError where Triton does not interpret; CompileError for what there is no kernel for. The function
        raises SparsecError if a launch writes beyond one of its tensors.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SparsecError("Triton interprets kernels only where TRITON_INTERPRET=1 is set before it is imported")
    sketch = sketch_kernel(func)
    let_loops_run()
    shuffle_programs()
    name = "generated_" + hashlib.sha256(sketch.source.encode()).hexdigest()[:16]
    path = folder / f"{name}.py"
    path.write_text(sketch.source, encoding="utf-8")
    module = load_module(name, path)

    def load(config: Any) -> Any:
        function = getattr(module, config["symbol"])

        def launch(grid: tuple[int, int], args: Sequence[Any]) -> None:
            # Scratch comes as bytes: a GPU sees addresses only, the interpreter wants to know the element type.
            typed = [_typed(arg, type) for arg, type in zip(args, config["types"], strict=True)]
            fenced(config["symbol"], lambda given: function[grid](*given, **config["constants"]), typed)

        return launch

    variants = [
        plan.Variant(
            schedule.up_to,
            {
                "scratch": list(schedule.scratch),
                "state": list(schedule.state),
                "launches": [_launch(entry, constants or {}) for entry in schedule.entries],
            },
        )
        for schedule in sketch.schedules
    ]
    op = func.body.ops[0]
    arguments = [v for argument in op.arguments for v in (argument if isinstance(argument, tuple) else (argument,))]
    params = tuple(type_of(value.type) if isinstance(value, Value) else None for value in arguments)
    results = tuple(type_of(value.type) for value in op.results)
    fixed = func.attrs["tokens"]
    tokens = fixed if isinstance(fixed, int) and not isinstance(fixed, bool) else "t"
    described = plan.Kernel(func.name, op.name, "triton", params, results, tokens, {}, {}, variants)
    call = launcher(described, torch.device("cpu"), load, sms=MULTIPROCESSORS)

    def run(operands: Sequence[Tensor | None]) -> Sequence[Tensor]:
        with poisoned():
            return call(operands)

    return run


def type_of(type: Any) -> plan.Tensor:
    """A tensor's type as a plan has it."""
    assert isinstance(type, TensorType)
    return plan.Tensor(tuple(str(dim) if isinstance(dim, Sym) else dim for dim in type.shape), type.dtype.value)


def _launch(entry: Entry, constants: Mapping[str, int]) -> dict[str, Any]:
    return {
        "symbol": entry.name,
        "grid": list(entry.grid),
        "args": [_argument(parameter.argument) for parameter in entry.parameters],
        "types": [parameter.type for parameter in entry.parameters],
        "constants": {name: constants.get(name, value) for name, value in entry.constants.items()},
    }


@cache
def let_loops_run() -> None:
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

        base = arg.tensor.view(DTYPES[arg.element])  # a bank of fp8 is mapped as bytes
        block = [int(side) for side in type[type.index("[") + 1 : type.index("]")].split(",")]
        return TensorDescriptor(base, list(arg.shape), list(arg.strides), block)
    if type == "*u8":
        return arg.view(torch.uint8)
    return arg.view(_POINTERS[type]) if type in _POINTERS and arg.dtype is torch.uint8 else arg


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
