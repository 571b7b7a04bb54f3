"""`sparsec::launch`: a compiled kernel as one torch operator, so that Inductor and AOT autograd carry it whole.

    torch.ops.sparsec.launch(name, [x, order, offsets, up])   # -> list of the kernel's results

Kernels are registered by name for the life of the process. Result shapes follow from the kernel's own types.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from sparsec.diagnostics import CompileError
from sparsec.ir.types import Sym, evaluate
from sparsec.runtime.backends import bind
from sparsec.runtime.context import Context, KernelCall
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.gpu_driver import architecture
from sparsec.runtime.plan import Kernel


@dataclass(frozen=True)
class _Registered:
    kernel: Kernel
    call: KernelCall
    parts: bool


_KERNELS: dict[str, _Registered] = {}


def register(kernel: Kernel, device: torch.device, files: Mapping[str, bytes]) -> str:
    """Make a kernel known to `sparsec::launch` and return its name there; the same kernel gets the same name."""
    binaries = [hashlib.sha256(files[file]).hexdigest() for file in kernel.binaries.values()]
    content = json.dumps([asdict(kernel), binaries, str(device)], sort_keys=True, default=str)
    name = f"{kernel.name}_{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    if name not in _KERNELS:
        # No operand is a constant of the program here: weights are inputs of the graph, packed when first seen.
        context = Context(device, files, lambda slot: None, live=True)
        call = bind(kernel, list(range(len(kernel.params))), context)
        # Generated kernels write into memory of their own; PyTorch operators may hand on what they were given.
        generated = kernel.backend == "triton" or (kernel.name in context.paths and context.paths[kernel.name].isa)
        _KERNELS[name] = _Registered(kernel, call, bool(kernel.regions) and not generated)
    return name


def kernel_call(name: str) -> KernelCall:
    """A registered kernel as a function of its operands."""
    return _KERNELS[name].call


def target_of(device: torch.device) -> str:
    """The target that kernels for a device are compiled for. Raises: CompileError."""
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise CompileError(f"sparsec has no target for device '{device}'")
    return architecture(device)


@torch.library.custom_op("sparsec::launch", mutates_args=(), schema="(str kernel, Tensor?[] inputs) -> Tensor[]")
def launch(kernel: str, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    registered = _KERNELS[kernel]
    results = list(registered.call(inputs))
    if registered.parts:
        _part(results, inputs)
    return results


def _part(results: list[Tensor], inputs: Sequence[Tensor | None]) -> None:
    """Copy results that share memory with an input or with one another, which an operator may not return.

    A region can yield what it was given, or two views of the same.
    """
    taken = {given.untyped_storage().data_ptr() for given in inputs if given is not None}
    for i, result in enumerate(results):
        if result.numel() and result.untyped_storage().data_ptr() in taken:
            results[i] = result.clone()
        taken.add(results[i].untyped_storage().data_ptr())


@launch.register_fake
def _fake(kernel: str, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    entry = _KERNELS[kernel].kernel
    env: dict[str, int] = {}
    for param, given in zip(entry.params, inputs, strict=True):
        if param is not None and given is not None:
            sizes = zip(param.shape, given.shape, strict=True)
            env.update({dim: size for dim, size in sizes if isinstance(dim, str) and dim.isidentifier()})
    like = next(given for given in inputs if given is not None)
    return [
        like.new_empty(
            [evaluate(dim if isinstance(dim, int) else Sym(dim), env) for dim in result.shape],
            dtype=DTYPES[result.dtype],
        )
        for result in entry.results
    ]
