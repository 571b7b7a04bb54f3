"""Makes the kernels of a plan callable: picks who runs one, gives it its constant operands and its region.

Backends `torch` and `onednn` are here: the same code on plain weights (any device) and on prepacked ones (CPU).
`triton` is `sparsec.runtime.triton_kernels`, imported where a plan asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsec.runtime import cpu_kernels, gradients
from sparsec.runtime.context import Context, KernelCall, Operand, RegionCall
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.live_banks import live_bank, remembered
from sparsec.runtime.packing import Bank, Tiled
from sparsec.runtime.plan import Free, Kernel, Region
from sparsec.runtime.plan import Tensor as Spec
from sparsec.runtime.steps import Runner
from sparsec.runtime.tiles import unpack_bias


def region_call(region: Region, device: torch.device) -> RegionCall:
    """A region as a function of its arguments."""
    steps, params, outs = region.steps, region.params, region.outs
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
    if kernel.backend == "cpp":
        from sparsec.runtime import native

        call = native.bind(kernel, slots, context)
        if call is not None:
            return call
    if kernel.backend not in ("torch", "onednn", "cpp") or kernel.op not in _MAKERS:
        raise ArtifactError(f"kernel '{kernel.name}': there is no {kernel.op} for backend '{kernel.backend}'")
    return _MAKERS[kernel.op](kernel, slots, context)


def _route(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    body = _region(kernel, "body", context)
    return lambda ins: body(_tensors(*ins))


def _route_group(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    body, experts = _region(kernel, "body", context), _attr(kernel, "num_experts", int)

    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        ids, weights, *extras = body(_tensors(*ins))
        return (ids, weights, *cpu_kernels.group(ids, experts), *extras)

    return run


def _group(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    experts = _attr(kernel, "num_experts", int)
    return lambda ins: cpu_kernels.group(_tensors(ins[0])[0], experts)


def _gather_gemm(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    bank_of, k = _bank(kernel, slots, context, "up", 3, 4), _attr(kernel, "k", int)
    activation, parts = _activation(kernel, context)

    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        x, order, offsets = _tensors(*ins[:3])
        up, early = bank_of(ins), ins[5] if len(ins) > 5 else None
        few = cpu_kernels.is_few(order.shape[0], x, up, parts)
        return (cpu_kernels.gather_gemm(x, order, offsets, up, k, activation, parts, few, early),)

    return run


def _gemm_combine(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    bank_of, tail_of = _bank(kernel, slots, context, "down", 4, 5), _tail(kernel, context)
    weighted = bool(kernel.attrs.get("weighted", True))

    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        h, order, offsets, weights = _tensors(*ins[:4])
        return (cpu_kernels.gemm_combine(h, order, offsets, weights, bank_of(ins), weighted, tail_of(ins[8:])),)

    return run


def _experts(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    run_bank = _expert_bank(kernel, slots, context, 3)

    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        x, ids, weights = _tensors(*ins[:3])
        return (run_bank(ins, x, ids, weights, ins[9:]),)

    return run


def _layer(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    router, count = _region(kernel, "router", context), len(kernel.regions["router"].params) - 1
    run_bank = _expert_bank(kernel, slots, context, 2)

    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        x, logits = _tensors(*ins[:2])
        ids, weights, *extras = router([logits, *_tensors(*ins[8 : 8 + count])])
        return (run_bank(ins, x, ids, weights, ins[8 + count :]), ids, weights, *extras)

    return run


def _expert_bank(
    kernel: Kernel, slots: Sequence[int | None], context: Context, first: int
) -> Callable[[Sequence[Operand], Tensor, Tensor, Tensor, Sequence[Operand]], Tensor]:
    """Sort, GEMMs and combine of an expert layer: operands, x, ids, weights, the tail's parameters -> y.

    Operands from number `first` on are up, down, their biases, their scales.
    """
    up_of = _bank(kernel, slots, context, "up", first, first + 2, first + 4)
    down_of = _bank(kernel, slots, context, "down", first + 1, first + 3, first + 5)
    (activation, parts), tail_of = _activation(kernel, context), _tail(kernel, context)
    early = kernel.attrs.get("weight_on", "output") == "input"

    def run(ins: Sequence[Operand], x: Tensor, ids: Tensor, weights: Tensor, tail_params: Sequence[Operand]) -> Tensor:
        up, down = up_of(ins), down_of(ins)
        order, offsets = cpu_kernels.group(ids, up.experts)
        few = cpu_kernels.is_few(order.shape[0], x, up, parts)
        rows, tail = weights if early else None, tail_of(tail_params)
        return cpu_kernels.experts(x, order, offsets, weights, up, down, activation, parts, few, rows, not early, tail)

    return run


def _hidden_grad(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    attrs = (bool(kernel.attrs.get("up_transposed", False)), bool(kernel.attrs.get("down_transposed", False)))
    body, layout = _region(kernel, "gradient", context), str(kernel.attrs.get("layout", "concat"))

    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        return gradients.hidden_grad(_tensors(*ins[:7]), [*ins, None, None][7:9], body, layout, *attrs)

    return run


def _bank_grad(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    k, transposed = _attr(kernel, "k", int), bool(kernel.attrs.get("transposed", False))

    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        rows, tokens, order, offsets = _tensors(*ins)
        return (gradients.bank_grad(rows, tokens, order, offsets, k, transposed),)

    return run


def _bias_grad(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    def run(ins: Sequence[Operand]) -> Sequence[Tensor]:
        rows, order, offsets = _tensors(*ins[:3])
        return (gradients.bias_grad(rows, order, offsets, ins[3] if len(ins) > 3 else None),)

    return run


_MAKERS: dict[str, Callable[[Kernel, Sequence[int | None], Context], KernelCall]] = {
    "moe.experts": _experts,
    "moe.group": _group,
    "moe.layer": _layer,
    "moe.route": _route,
    "moe.route_group": _route_group,
    "moe.gather_gemm": _gather_gemm,
    "moe.gemm_combine": _gemm_combine,
    "moe.hidden_grad": _hidden_grad,
    "moe.bank_grad": _bank_grad,
    "moe.bias_grad": _bias_grad,
}


def _region(kernel: Kernel, name: str, context: Context) -> RegionCall:
    if name not in kernel.regions:
        raise ArtifactError(f"kernel '{kernel.name}' lacks its region '{name}'")
    return region_call(kernel.regions[name], context.device)


def _activation(kernel: Kernel, context: Context) -> tuple[cpu_kernels.Activation, int]:
    body = _region(kernel, "activation", context)
    return lambda parts: body(parts)[0], len(kernel.regions["activation"].params)


def _tail(kernel: Kernel, context: Context) -> Callable[[Sequence[Operand]], cpu_kernels.Tail | None]:
    """A kernel's tail, given its parameters."""
    if "tail" not in kernel.regions:
        return lambda params: None
    body = _region(kernel, "tail", context)

    def tail_of(params: Sequence[Operand]) -> cpu_kernels.Tail:
        given = _tensors(*params)
        return lambda rows: body([rows, *given])[0]

    return tail_of


def _bank(
    kernel: Kernel,
    slots: Sequence[int | None],
    context: Context,
    prefix: str,
    weight: int,
    bias: int,
    scale: int | None = None,
) -> Callable[[Sequence[Operand]], Bank]:
    """How to get a launch's bank: packed once if its weights never change, else made anew at every launch.

    Args:
        weight, bias, scale: which operands they are.
    """
    numbers = (weight, bias, scale)
    places = [slots[i] if i is not None and i < len(slots) else None for i in numbers]
    param, rows = kernel.params[weight], kernel.params[0]
    if param is None or rows is None or places[0] is None:
        raise ArtifactError(f"kernel '{kernel.name}' lacks its bank '{prefix}'")
    dtype = DTYPES[rows.dtype]
    transposed = bool(kernel.attrs.get(f"{prefix}_transposed", False))
    interleaved = prefix == "up" and kernel.attrs.get("layout", "concat") == "interleaved"
    packing = str(kernel.attrs.get("packing", "plain"))
    tiled = None if packing == "plain" else _tiled(kernel, prefix, packing, param, dtype)
    if tiled is None and len(param.shape) != 3:
        raise ArtifactError(f"kernel '{kernel.name}': its bank '{prefix}' has {len(param.shape)} dimensions, not 3")
    may_pack = kernel.backend != "torch"
    kind = (dtype, transposed, interleaved)

    def make(given: Tensor, given_bias: Operand, scales: Operand, pack: bool) -> Bank:
        return Bank(given, given_bias, *kind, pack) if tiled is None else tiled(given, given_bias, scales, pack)

    key = (*places, *kind, packing, may_pack)
    bank = context.banks.get(key)
    if bank is not None:
        return lambda ins: bank
    fixed = [None if place is None else context.constant(place) for place in places]
    if fixed[0] is not None and all(
        (place is None) == (value is None) for place, value in zip(places, fixed, strict=True)
    ):
        made = context.banks[key] = make(fixed[0], fixed[1], fixed[2], may_pack)
        return lambda ins: made

    def anew(ins: Sequence[Operand]) -> Bank:
        given = [
            ins[i] if value is None and i is not None and i < len(ins) else value
            for i, value in zip(numbers, fixed, strict=True)
        ]
        (matrix,) = _tensors(given[0])
        if not (context.live and may_pack):
            return make(matrix, given[1], given[2], False)
        if tiled is None:
            return live_bank(matrix, given[1], *kind)
        return remembered(_tensors(*given), (*kind, packing), lambda pack: make(matrix, given[1], given[2], pack))

    return anew


def _tiled(
    kernel: Kernel, prefix: str, packing: str, param: Spec, dtype: torch.dtype
) -> Callable[[Tensor, Operand, Operand, bool], Bank]:
    """How to make a bank of tiles, their bias and their scales."""
    activation = kernel.regions.get("activation")
    taken = activation.params if activation is not None else ()
    ends = [kernel.params[0], kernel.results[0], *taken[:1]]
    sizes = [type.shape[-1] for type in ends if type is not None and type.shape] + list(param.shape[:1])
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) != 4:
        raise ArtifactError(f"kernel '{kernel.name}': the sizes of its packed banks are not known")
    hidden, columns, width, experts = known
    parts = len(taken) if prefix == "up" else 1
    shape = (experts, parts * width, hidden) if prefix == "up" else (experts, columns, width)

    def make(packed: Tensor, bias: Operand, scales: Operand, pack: bool) -> Bank:
        weight = Tiled(packed, scales, packing, parts, shape, dtype)
        plain = None if bias is None else unpack_bias(bias, parts, shape[1])
        try:
            return Bank(weight, plain, dtype, pack=pack)
        except (RuntimeError, ValueError) as error:
            raise ArtifactError(f"kernel '{kernel.name}': its bank '{prefix}' cannot be unpacked: {error}") from error

    return make


def _attr(kernel: Kernel, name: str, kind: type[Any]) -> Any:
    value = kernel.attrs.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ArtifactError(f"kernel '{kernel.name}' lacks its attribute '{name}'")
    return value


def _tensors(*operands: Operand) -> list[Tensor]:
    """Operands that the kernel cannot do without (`runtime.check` has seen to it that they are there)."""
    return [operand for operand in operands if operand is not None]
