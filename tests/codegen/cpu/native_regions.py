"""Many generated region functions as one C++ source with a kernel's ABI, and the interpreter's results for them."""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsec.codegen.cpu import compiler, regions
from sparsec.dialects.aten import AtenOp
from sparsec.dialects.dtypes import to_torch
from sparsec.ir.core import Block, Func, Module
from sparsec.ir.interp import evaluate_module
from sparsec.runtime import isa as processor

TEXT_OF = {"router": regions.router, "tail": regions.tail, "activation": regions.activation}


@dataclass(frozen=True)
class Case:
    """A region with values for its arguments; the first has rows."""

    kind: str
    block: Block
    inputs: Sequence[Tensor]

    def wanted(self) -> list[Tensor]:
        """What the interpreter gives, equal scores chosen in the order that kernels promise."""
        main = Func("main", self.block)
        with lowest_of_equals():
            return evaluate_module(Module([main]), self.inputs, {})

    def results(self) -> list[Tensor]:
        """Room for the results: bytes 255."""
        rows, found = self.inputs[0].shape[0], list[Tensor]()
        for value in self.block.terminator.operands:
            sizes = [rows, *value.tensor.shape[1:]]
            dtype = torch.float32 if self.kind != "router" else to_torch(value.tensor.dtype)
            size = torch.Size(map(int, sizes)).numel() * dtype.itemsize
            found.append(torch.full((size,), 255, dtype=torch.uint8).view(dtype).reshape([int(n) for n in sizes]))
        return found

    def source(self, i: int, first_in: int, first_out: int) -> str:
        """The region's function, and `run_i` that calls it for all rows."""
        match self.kind:
            case "router":
                body = f"for (int64_t row = 0; row < {self.inputs[0].shape[0]}; ++row) route_row(in, row, out);"
            case "tail":
                rows, width = self.inputs[0].shape
                body = f"const float* y = (const float*)in[0]; float* z = (float*)out[0];\n  for (int64_t row = 0; row < {rows}; ++row) tail_row(y + row * {width}, z + row * {width}, in + 1);"  # noqa: E501
            case _:
                args = ", ".join(f"load_f32((const float*)in[{j}] + i)" for j in range(len(self.inputs)))
                size = self.inputs[0].numel()
                body = f"for (int i = 0; i < {size}; i += 16) store_f32((float*)out[0] + i, activation({args}));"
        head = f"static void run_{i}(const void* const* in, void* const* out) {{\n  {body}\n}}"
        call = f"static void call_{i}(const Call* call) {{ case_{i}::run_{i}(call->in + {first_in}, call->out + {first_out}); }}"  # noqa: E501
        return f"namespace case_{i} {{\n{TEXT_OF[self.kind](self.block)}{head}\n}}\n{call}\n"


def source(cases: Sequence[Case]) -> str:
    """All of `cases` as one kernel: operands and results one case after the other."""
    texts, ins, outs = [header("call.h"), header("vec.h"), header("vecmath.h"), header("rows.h")], 0, 0
    for i, case in enumerate(cases):
        texts.append(case.source(i, ins, outs))
        ins, outs = ins + len(case.inputs), outs + len(case.block.terminator.operands)
    calls = "\n".join(f"  call_{i}(call);" for i in range(len(cases)))
    texts.append(f"SPARSEC_EXPORT int32_t sparsec_run(const Call* call) {{\n{calls}\n  return 0;\n}}")
    texts.append("SPARSEC_EXPORT int64_t sparsec_scratch(int64_t, int32_t) { return 0; }\n")
    return "\n".join(texts)


def header(name: str) -> str:
    text = (regions.INCLUDE / name).read_text()
    return re.sub(r'#pragma once\n|#include "\w+\.h"\n', "", text)


@cache
def isas() -> tuple[str, ...]:
    """Instruction sets to run: those of this processor that the compiler knows; AMX adds nothing here."""
    return tuple(isa for isa in processor.processor() if isa in compiler.isas() and isa != "amx")


class _Call(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_int64), ("ins", ctypes.c_void_p), ("outs", ctypes.c_void_p), ("scratch", ctypes.c_void_p),
        ("threads", ctypes.c_int32), ("parallel", ctypes.c_void_p), ("barrier", ctypes.c_void_p),
    ]  # fmt: skip


def run(cases: Sequence[Case], isa: str) -> list[list[Tensor]]:
    """The results of each case, computed by its C++."""
    library = _library(source(cases), isa)
    found = [case.results() for case in cases]
    ins = [shifted(tensor) for case in cases for tensor in case.inputs]
    outs = [tensor for results in found for tensor in results]
    arrays = [(ctypes.c_void_p * len(part))(*(tensor.data_ptr() for tensor in part)) for part in (ins, outs)]
    call = _Call(1, *(ctypes.cast(array, ctypes.c_void_p) for array in arrays), None, 1, None, None)
    assert library.sparsec_run(ctypes.byref(call)) == 0
    return found


def shifted(tensor: Tensor) -> Tensor:
    """A contiguous copy whose memory begins at no boundary of a vector."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    room[1:] = tensor.reshape(-1)
    return room[1:].view(tensor.shape)


@cache
def _library(text: str, isa: str) -> ctypes.CDLL:
    if isa not in isas():
        pytest.skip(f"no compiler or no processor for {isa}")
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        Path(file.name).write_bytes(compiler.build(text, isa))
        return ctypes.CDLL(file.name)


@contextmanager
def lowest_of_equals() -> Iterator[None]:
    """Top-k and sorts of the interpreter choose the first of equals, which PyTorch leaves open."""
    plain = AtenOp.reference

    def reference(self: AtenOp, env: Any, *args: Any) -> Any:
        attrs, dim = self.attrs, self.attrs.get("dim", -1)
        match self.name:
            case "aten.topk":
                values, ids = args[0].sort(dim=dim, descending=attrs.get("largest", True), stable=True)
                return values.narrow(dim, 0, attrs["k"]), ids.narrow(dim, 0, attrs["k"])
            case "aten.sort" | "aten.argsort":
                values, ids = args[0].sort(dim=dim, descending=attrs.get("descending", False), stable=True)
                return ids if self.name == "aten.argsort" else (values, ids)
            case _:
                return plain(self, env, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AtenOp, "reference", reference)
        yield


def same(got: Tensor, wanted: Tensor) -> None:
    """Integers equal, floats but for the last places of their element type."""
    if not wanted.dtype.is_floating_point:
        assert torch.equal(got.to(wanted.dtype), wanted)
        return
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[wanted.dtype]
    torch.testing.assert_close(got.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance / 10, equal_nan=True)
