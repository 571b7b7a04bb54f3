"""Runs linalg on tensors on MLIR's ExecutionEngine: a compiler that shares no code with ours, to compare with."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from sparsec.diagnostics import SparsecError
from sparsec.dialects.dtypes import to_torch
from sparsec.dialects.moe import ExpertBank, Layer, Route
from sparsec.inspect.linalg import FUNCTION, require_torch_mlir
from sparsec.ir.core import Module, Value
from sparsec.ir.interp import evaluate_module

_PIPELINE = ",".join(
    (
        "func.func(linalg-generalize-named-ops,linalg-fuse-elementwise-ops)",
        "one-shot-bufferize{bufferize-function-boundaries function-boundary-type-conversion=identity-layout-map}",
        "buffer-results-to-out-params{modify-public-functions=true}",
        "buffer-deallocation-pipeline",
        "func.func(refback-munge-memref-copy,convert-linalg-to-loops,llvm-request-c-wrappers)",
        "expand-strided-metadata",
        "lower-affine",
        "convert-scf-to-cf",
        "func.func(arith-expand)",
        "convert-math-to-llvm",
        "convert-math-to-libm",
        "convert-bufferization-to-memref",
        "finalize-memref-to-llvm",
        "convert-arith-to-llvm",
        "convert-func-to-llvm",
        "convert-cf-to-llvm",
        "convert-complex-to-llvm",
        "reconcile-unrealized-casts",
    )
)


class Engine:
    """A text of linalg compiled for this machine. Raises: SparsecError where MLIR does not compile it."""

    def __init__(self, text: str) -> None:
        require_torch_mlir()
        ir: Any = import_module("torch_mlir.ir")
        passes: Any = import_module("torch_mlir.passmanager")
        engine: Any = import_module("torch_mlir.execution_engine")
        with ir.Context():
            try:
                module = ir.Module.parse(text)
                passes.PassManager.parse(f"builtin.module({_PIPELINE})").run(module.operation)
                self._engine: Any = engine.ExecutionEngine(module, opt_level=2)
            except (ir.MLIRError, RuntimeError) as error:
                raise SparsecError(f"MLIR does not compile this: {error}") from error

    def run(self, args: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Call the function; `results` are written, and must be dense and of its results' shapes and dtypes."""
        tensors = [*(arg.contiguous() for arg in args), *results]
        descriptors = [_descriptor(tensor) for tensor in tensors]
        pointers = [ctypes.pointer(ctypes.pointer(descriptor)) for descriptor in descriptors]
        self._engine.invoke(FUNCTION, *pointers)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a result on the ExecutionEngine is from the reference's."""

    name: str
    error: float  #: of floats the largest difference, by the largest value of the reference; else how many differ
    differing: int  #: values that are not the same
    values: int


def compare(module: Module, text: str, seed: int = 0) -> list[Agreement]:
    """Run `main`, whose sizes are known, by its references and its linalg `text` by MLIR, on the same random values."""
    main = module.main
    made = random_arguments(module, seed)
    inputs, weights = list[Tensor](), dict[str, Tensor]()
    for arg, value in zip(main.body.args, made, strict=True):
        attrs = main.arg_attrs.get(arg, {})
        if attrs.get("kind", "input") == "input":
            inputs.append(value)
        else:
            weights[str(attrs["source"])] = value
    wanted: list[Tensor] = evaluate_module(module, inputs, weights)
    found = [torch.zeros_like(value, memory_format=torch.contiguous_format) for value in wanted]
    Engine(text).run(made, found)
    results = main.body.terminator.operands
    names = [value.name or f"result {i}" for i, value in enumerate(results)]
    for values in (wanted, found):
        _order_slots(results, values)
    return [_agreement(*each) for each in zip(names, wanted, found, strict=True)]


def random_arguments(module: Module, seed: int) -> list[Tensor]:
    """Values for the arguments of `main`: normal floats, weights scaled by their rows; integers that name experts."""
    generator = torch.Generator().manual_seed(seed)
    experts = min((op.num_experts for op in module.walk() if isinstance(op, ExpertBank)), default=2)
    made = list[Tensor]()
    for arg in module.main.body.args:
        shape, dtype = [int(dim) for dim in arg.tensor.shape], to_torch(arg.tensor.dtype)
        if not dtype.is_floating_point:
            made.append(torch.randint(0, 2 if dtype == torch.bool else experts, shape, generator=generator).to(dtype))
            continue
        is_weight = module.main.arg_attrs.get(arg, {}).get("kind", "input") != "input"
        scale = shape[-1] ** -0.5 if is_weight and len(shape) > 1 else 1.0
        made.append((torch.randn(shape, generator=generator) * scale).to(dtype))
    return made


def _order_slots(results: Sequence[Value], values: list[Tensor]) -> None:
    """Bring a token's ids and weights into the order of ids where its router leaves their order open."""
    for op in {value.op for value in results}:
        if not isinstance(op, Route | Layer) or not {op.ids, op.weights} <= set(results):
            continue
        if any(inner.attrs.get("sorted") is False for inner in op.regions[0].walk()):
            ids, weights = results.index(op.ids), results.index(op.weights)
            order = values[ids].argsort(dim=-1, stable=True)
            values[ids], values[weights] = values[ids].gather(-1, order), values[weights].gather(-1, order)


def _agreement(name: str, wanted: Tensor, found: Tensor) -> Agreement:
    differing = int((wanted != found).sum())
    if wanted.is_floating_point() and wanted.numel():
        error = float((wanted.double() - found.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))
    else:
        error = float(differing)
    return Agreement(name, error, differing, wanted.numel())


def _descriptor(tensor: Tensor) -> ctypes.Structure:
    """MLIR's view of a dense tensor."""
    if not tensor.is_contiguous():
        raise SparsecError(f"a tensor of shape {list(tensor.shape)} and strides {tensor.stride()} is not dense")
    sizes = ctypes.c_int64 * tensor.dim()

    class MemRef(ctypes.Structure):
        _fields_ = (
            ("allocated", ctypes.c_void_p),
            ("aligned", ctypes.c_void_p),
            ("offset", ctypes.c_int64),
            ("sizes", sizes),
            ("strides", sizes),
        )

    return MemRef(tensor.data_ptr(), tensor.data_ptr(), 0, sizes(*tensor.shape), sizes(*tensor.stride()))
