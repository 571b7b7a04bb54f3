"""Makes the kernels of a plan callable: picks who runs one, gives it its constant operands and its region.

Backends `torch` and `onednn` are here: the same code on plain weights (any device) and on prepacked ones (CPU).
`triton` is `sparsec.runtime.triton_kernels`, imported where a plan asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsec.runtime import cpu_kernels
from sparsec.runtime.context import Context, KernelCall, Operand, Region
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.live_banks import live_bank
from sparsec.runtime.packing import Bank
from sparsec.runtime.plan import Free, Kernel, Step
from sparsec.runtime.plan import Tensor as Spec
from sparsec.runtime.steps import Runner


def region(kernel: Kernel, device: torch.device) -> Region:
    """A kernel's region as a function."""
    return region_of(kernel.body, kernel.body_params, kernel.body_outs, device)


def region_of(steps: Sequence[Step], params: Sequence[Spec], outs: Sequence[int], device: torch.device) -> Region:
    """Steps over slots of their own as a function of what slots 0, 1, ... hold; `params` are the types of those."""
    symbols = {
        dim: (i, axis)
        for i, param in enumerate(params)
        for axis, dim in enumerate(param.shape)
        if isinstance(dim, str) and dim.isidentifier()
    }
    slots = [len(params) - 1, *outs]
    for step in steps:
        if not isinstance(step, Free):
            slots += [slot for slot in step.outs if slot is not None]
    runner = Runner(steps, max(slots) + 1, symbols, device)

    def run(args: Sequence[Tensor]) -> list[Tensor]:
        values = runner.start({name: args[i].shape[axis] for name, (i, axis) in symbols.items()})
        values[: len(args)] = args
        runner.run(values)
        return [values[slot] for slot in outs]

    return run


def bind(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    """A kernel for one place in the plan, whose operands are in `slots`. Raises: ArtifactError."""
    if kernel.backend == "triton":
        from sparsec.runtime import triton_kernels

        return triton_kernels.bind(kernel, slots, context)
    if kernel.backend not in ("torch", "onednn") or kernel.op not in _MAKERS:
        raise ArtifactError(f"kernel '{kernel.name}': there is no {kernel.op} for backend '{kernel.backend}'")
    return _MAKERS[kernel.op](kernel, slots, context)


def bind_pair(
    gather: Kernel, first: Sequence[int | None], combine: Kernel, second: Sequence[int | None], context: Context
) -> KernelCall:
    """`moe.gather_gemm` and the `moe.gemm_combine` that follows it as one call.

    Its operands are those of the first, then those of the second.
    """
    up_of = _bank(gather, first, context, 3, 4, "up")
    down_of = _bank(combine, second, context, 4, 5, "down")
    activation, parts = _activation(gather, context)
    weighted, tail_of = _weighted(combine), _tail(combine, context)
    batched, split = _batched(gather), len(gather.params)

    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        x, order, offsets, weights = _tensors(ins[0], ins[1], ins[2], ins[split + 3])
        up, down, early, tail = up_of(ins), down_of(ins[split:]), _row_weights(ins[:split]), tail_of(ins[split:])
        few = batched(weights.shape[0], order.shape[0])
        return (
            cpu_kernels.experts(x, order, offsets, weights, up, down, activation, parts, few, early, weighted, tail),
        )

    return run


def _route(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    body = region(kernel, context.device)
    return lambda ins: body(_tensors(*ins))


def _route_group(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    body, experts = region(kernel, context.device), _attr(kernel, "num_experts", int)

    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        ids, weights, *extras = body(_tensors(*ins))
        return (ids, weights, *cpu_kernels.group(ids, experts), *extras)

    return run


def _group(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    experts = _attr(kernel, "num_experts", int)
    return lambda ins: cpu_kernels.group(_tensors(ins[0])[0], experts)


def _gather_gemm(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    bank_of, k = _bank(kernel, slots, context, 3, 4, "up"), _attr(kernel, "k", int)
    activation, parts = _activation(kernel, context)
    batched = _batched(kernel)

    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        x, order, offsets = _tensors(*ins[:3])
        few = batched(x.shape[0], order.shape[0])
        early = _row_weights(ins)
        return (cpu_kernels.gather_gemm(x, order, offsets, bank_of(ins), k, activation, parts, few, early),)

    return run


def _gemm_combine(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    bank_of = _bank(kernel, slots, context, 4, 5, "down")
    weighted, tail_of = _weighted(kernel), _tail(kernel, context)

    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        h, order, offsets, weights = _tensors(*ins[:4])
        return (cpu_kernels.gemm_combine(h, order, offsets, weights, bank_of(ins), weighted, tail_of(ins)),)

    return run


_MAKERS: dict[str, Callable[[Kernel, Sequence[int | None], Context], KernelCall]] = {
    "moe.group": _group,
    "moe.route": _route,
    "moe.route_group": _route_group,
    "moe.gather_gemm": _gather_gemm,
    "moe.gemm_combine": _gemm_combine,
}


def _activation(kernel: Kernel, context: Context) -> tuple[cpu_kernels.Activation, int]:
    body = region(kernel, context.device)
    return lambda parts: body(parts)[0], len(kernel.body_params)


def _row_weights(ins: Sequence[Operand]) -> Operand:
    """The weights that a gathered GEMM's rows are multiplied by, among its operands."""
    return ins[5] if len(ins) > 5 else None


def _weighted(kernel: Kernel) -> bool:
    return bool(kernel.attrs.get("weighted", True))


def _tail(kernel: Kernel, context: Context) -> Callable[[Sequence[Operand]], cpu_kernels.Tail | None]:
    """The tail of a combining GEMM, given the operands of a launch."""
    if not kernel.body_outs:
        return lambda ins: None
    body = region(kernel, context.device)

    def tail_of(ins: Sequence[Operand]) -> cpu_kernels.Tail:
        params = _tensors(*ins[6:])
        return lambda rows: body([rows, *params])[0]

    return tail_of


def _batched(kernel: Kernel) -> Callable[[int, int], bool]:
    """Whether a launch over so many tokens and pairs is `batched`, by the variants or by the number of pairs."""
    choices = [(variant.up_to, variant.config.get("path")) for variant in kernel.variants]
    if any(path not in (None, "batched", "streamed") for _, path in choices):
        raise ArtifactError(f"kernel '{kernel.name}' has a variant whose path is neither 'batched' nor 'streamed'")

    def choose(tokens: int, pairs: int) -> bool:
        path = next((path for up_to, path in choices if up_to is None or tokens <= up_to), None)
        return pairs <= cpu_kernels.BATCHED_ROWS if path is None else path == "batched"

    return choose


def _bank(
    kernel: Kernel, slots: Sequence[int | None], context: Context, weight: int, bias: int, prefix: str
) -> Callable[[Sequence[Operand]], Bank]:
    """How to get a launch's bank: packed once if its weights never change, else made anew at every launch."""
    param = kernel.params[weight]
    place = slots[weight]
    if param is None or place is None or len(param.shape) != 3:
        raise ArtifactError(f"kernel '{kernel.name}' lacks its bank '{prefix}'")
    bias_slot = slots[bias] if bias < len(slots) else None
    transposed = bool(kernel.attrs.get(f"{prefix}_transposed", False))
    interleaved = prefix == "up" and kernel.attrs.get("layout", "concat") == "interleaved"
    rows = kernel.params[0]
    assert rows is not None
    dtype = DTYPES[rows.dtype]
    pack = kernel.backend == "onednn"
    key = (place, bias_slot, dtype, transposed, interleaved, pack)
    bank = context.banks.get(key)
    if bank is not None:
        return lambda ins: bank
    fixed = context.constant(place)
    fixed_bias = None if bias_slot is None else context.constant(bias_slot)
    if fixed is not None and (bias_slot is None or fixed_bias is not None):
        made = context.banks[key] = Bank(fixed, fixed_bias, dtype, transposed, interleaved, pack)
        return lambda ins: made

    def anew(ins: Sequence[Operand]) -> Bank:
        (given,) = _tensors(fixed if fixed is not None else ins[weight])
        given_bias = fixed_bias if fixed_bias is not None or bias_slot is None else ins[bias]
        if context.live and pack:
            return live_bank(given, given_bias, dtype, transposed, interleaved)
        return Bank(given, given_bias, dtype, transposed, interleaved, pack=False)

    return anew


def _attr(kernel: Kernel, name: str, kind: type[Any]) -> Any:
    value = kernel.attrs.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ArtifactError(f"kernel '{kernel.name}' lacks its attribute '{name}'")
    return value


def _tensors(*operands: Operand) -> list[Tensor]:
    """Operands that the kernel cannot do without (`runtime.check` has seen to it that they are there)."""
    return [operand for operand in operands if operand is not None]
