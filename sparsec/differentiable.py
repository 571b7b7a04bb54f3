"""`sparsec::bank`: a bank of experts that can be trained, by generated kernels forward and backward.

    y, *order = torch.ops.sparsec.bank(x, ids, weights, up, down, None, None, activation=..., gradient=...,
                                       layout="concat", up_transposed=False, down_transposed=False)

Operands and options are those of `sparsec::experts`; `gradient` is the region of `moe.hidden_grad`, as a string too.
Of the forward pass only the operands and the order of the pairs are kept: the backward pass computes the up-projection
again. Kernels are built when they are first needed, once for each kind of bank, and for those gradients that are asked
for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsec import pipeline
from sparsec.codegen.emit import emit
from sparsec.dialects.builtin import Return
from sparsec.dialects.dtypes import from_torch
from sparsec.dialects.kernel import Launch
from sparsec.dialects.moe import TILE_ROWS, BankGrad, BiasGrad, GatherGemm, GemmCombine, Group, HiddenGrad, group_types
from sparsec.frontend import region
from sparsec.frontend.experts_op import fits
from sparsec.ir.core import Attr, Block, Func, Module, Value
from sparsec.ir.opdef import OpDef
from sparsec.ir.types import Dim, Sym, TensorType
from sparsec.launch import kernel_call, register, target_of

# PyTorch keeps compiled graphs on disk by the names of their operators: another schema needs another name.
_OPTIONS = "str activation, str gradient, str layout, bool up_transposed, bool down_transposed"
_BANKS = "Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias"
FORWARD = f"(Tensor x, Tensor ids, Tensor weights, {_BANKS}, *, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
BACKWARD = (
    f"(Tensor y_grad, Tensor x, Tensor order, Tensor offsets, Tensor tiles, Tensor weights, {_BANKS}, *, "
    f"bool[] needed, {_OPTIONS}) -> Tensor[]"
)
WITH_GRADIENT = ("x", "weights", "up", "down", "up_bias", "down_bias")
"""Operands that have a gradient, in the order of `needed`."""

TOKENS = Sym("s0")
Program = Callable[[Sequence[Tensor | None]], list[Tensor]]
OpT = TypeVar("OpT", bound=OpDef)


@dataclass(frozen=True)
class Kind:
    """What kernels of a bank depend on: types of its operands (None: left out), options, device."""

    types: tuple[TensorType | None, ...]
    activation: str
    gradient: str
    layout: str
    up_transposed: bool
    down_transposed: bool
    device: torch.device

    @property
    def experts(self) -> int:
        types = [type for type in self.types if type is not None and type.rank == 3]
        return int(types[0].shape[0])


def kind_of(operands: Sequence[Tensor | None], per_token: int, options: Mapping[str, Any]) -> Kind:
    """The kind of a bank.

    Args:
        per_token: how many of the operands, the first ones, have a row for each token.
        options: as of `sparsec::bank`.
    """
    types = list[TensorType | None]()
    for i, tensor in enumerate(operands):
        sizes: list[Dim] = [] if tensor is None else [int(size) for size in tensor.shape]
        if i < per_token:
            sizes[0] = TOKENS
        types.append(None if tensor is None else TensorType(tuple(sizes), from_torch(tensor.dtype)))
    device = next(tensor.device for tensor in operands if tensor is not None)
    return Kind(tuple(types), device=device, **options)


class _Main:
    """Writes the function of a program: arguments by name, fused ops."""

    def __init__(self, names: Sequence[str], types: Sequence[TensorType | None]) -> None:
        given = [(name, type) for name, type in zip(names, types, strict=True) if type is not None]
        self.block = Block([type for _, type in given], [name for name, _ in given])
        self.values: dict[str, Value | None] = dict.fromkeys(names)
        self.values.update(zip((name for name, _ in given), self.block.args, strict=True))

    def __getitem__(self, name: str) -> Value:
        value = self.values[name]
        assert value is not None
        return value

    def op(self, cls: type[OpT], attrs: dict[str, Attr], *regions: Block, **operands: Value | None) -> OpT:
        """Append an op, its operands by name."""
        ordered = [operands.get(name) for name in cls.fields().operands]
        while ordered[-1] is None:
            ordered.pop()
        op = cls(ordered, None, attrs, list(regions))
        self.block.append(op)
        return op

    def lowered(self, results: Sequence[Value], target: str) -> Module:
        """The module that yields these values, as launches of kernels."""
        self.block.append(Return(list(results)))
        func = Func("main", self.block)
        func.arg_attrs = {arg: {"kind": "input"} for arg in self.block.args}
        func.result_attrs = {i: {"kind": "output"} for i in range(len(results))}
        module = Module([func], {"phase": "fuse", "version": pipeline.VERSION, "target": target})
        return pipeline.run(module, target=target).module


def forward(kind: Kind, target: str) -> Module:
    """x, ids, weights, banks -> y, order, offsets, and tiles on GPUs: as launches of kernels."""
    main = _Main(("x", "ids", "weights", "up", "down", "up_bias", "down_bias"), kind.types)
    listed: dict[str, Attr] = {} if target == "cpu" else {"listed": True}
    group = main.op(Group, {"num_experts": kind.experts, **listed}, ids=main["ids"])
    sort = dict(zip(("order", "offsets", "tiles"), group.results, strict=False))
    attrs: dict[str, Attr] = {"k": _k(main), "layout": kind.layout, "up_transposed": kind.up_transposed}
    up = {name: main.values[name] for name in ("x", "up", "up_bias")}
    h = main.op(GatherGemm, attrs, region.decode(kind.activation), **sort, **up).h
    down = {name: main.values[name] for name in ("weights", "down", "down_bias")}
    y = main.op(GemmCombine, {"down_transposed": kind.down_transposed}, h=h, **sort, **down).y
    return main.lowered([y, *group.results], target)


def backward(kind: Kind, needed: Sequence[bool], target: str) -> Module:
    """y_grad, x, weights, order, offsets, tiles, banks -> the gradients that are needed: as launches of kernels.

    The types in `kind` lack those of order, offsets and tiles; tiles are left out on CPUs.
    """
    names = ("y_grad", "x", "weights", "order", "offsets", "tiles", "up", "down", "up_bias", "down_bias")
    y_grad, x, weights, *banks = kind.types
    assert weights is not None
    order, offsets, tiles = group_types(weights, kind.experts, listed=True)
    main = _Main(names, [y_grad, x, weights, order, offsets, None if target == "cpu" else tiles, *banks])
    wanted = {name for name, needs in zip(WITH_GRADIENT, needed, strict=True) if needs}
    sort = {"order": main["order"], "offsets": main["offsets"]}
    flags: dict[str, Attr] = {"up_transposed": kind.up_transposed, "down_transposed": kind.down_transposed}
    body = region.decode(kind.gradient)
    hidden = main.op(HiddenGrad, {"layout": kind.layout, **flags}, body, **main.values)
    grads = {"weights": hidden.weights_grad}
    k: dict[str, Attr] = {"k": _k(main)}
    if "x" in wanted:
        attrs: dict[str, Attr] = {"down_transposed": not kind.up_transposed, "weighted": False}
        rest = {"weights": main["weights"], "down": main["up"], "tiles": main.values["tiles"]}
        grads["x"] = main.op(GemmCombine, attrs, h=hidden.h_grad, **sort, **rest).y
    if "up" in wanted:
        attrs = {**k, "transposed": kind.up_transposed}
        grads["up"] = main.op(BankGrad, attrs, rows=hidden.h_grad, tokens=main["x"], **sort).grad
    if "down" in wanted:
        attrs = {**k, "transposed": not kind.down_transposed}
        grads["down"] = main.op(BankGrad, attrs, rows=hidden.h, tokens=main["y_grad"], **sort).grad
    if "up_bias" in wanted:
        grads["up_bias"] = main.op(BiasGrad, {}, rows=hidden.h_grad, **sort).grad
    if "down_bias" in wanted:
        rest = {"rows": main["y_grad"], "weights": main["weights"]}
        grads["down_bias"] = main.op(BiasGrad, {}, **rest, **sort).grad
    return main.lowered([grads[name] for name in WITH_GRADIENT if name in wanted], target)


@cache
def _forward(kind: Kind) -> Program:
    target = target_of(kind.device)
    return _built(forward(kind, target), target, kind.device)


@cache
def _backward(kind: Kind, needed: tuple[bool, ...]) -> Program:
    target = target_of(kind.device)
    return _built(backward(kind, needed, target), target, kind.device)


def _built(module: Module, target: str, device: torch.device) -> Program:
    """Compile a lowered module."""
    for name, kernel in module.funcs.items():
        if name != "main" and target == "cpu":
            kernel.attrs["backend"] = "torch"  # weights change at every step: packing them does not pay
    emitted = emit(module, target, here=True)
    for remark in emitted.remarks:
        warnings.warn(f"sparsec: {remark.message}", stacklevel=2)
    names = {name: register(kernel, device, emitted.files) for name, kernel in emitted.plan.kernels.items()}
    return runner(module.main, {name: kernel_call(registered) for name, registered in names.items()})


def runner(main: Func, kernels: Mapping[str, Callable[[Sequence[Any]], Sequence[Tensor]]]) -> Program:
    """The launches of a lowered function as a function of its arguments, those that are left out as None."""
    launches = [op for op in main.body.ops if isinstance(op, Launch)]
    args, results = main.body.args, main.body.terminator.operands

    def run(given: Sequence[Tensor | None]) -> list[Tensor]:
        values = dict[Value | None, Tensor | None](zip(args, (item for item in given if item is not None), strict=True))
        values[None] = None
        for op in launches:
            made = kernels[op.callee]([values[value] for value in op.inputs])
            values.update(zip(op.results, made, strict=True))
        return [tensor for value in results if (tensor := values[value]) is not None]

    return run


def _k(main: _Main) -> int:
    return int(main["weights"].tensor.shape[1])


@torch.library.custom_op("sparsec::bank", mutates_args=(), schema=FORWARD)
def bank(x: Tensor, ids: Tensor, weights: Tensor, *banks: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    operands = [x, ids, weights, *banks]
    y, order, offsets, *tiles = _forward(kind_of(operands, 3, options))(operands)
    return (y, order, offsets, *(tiles or [order.new_zeros(1)]))


@bank.register_fake
def _bank_fake(
    x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, *biases: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fits(x, ids, up.shape[1 if options["up_transposed"] else 2], weights)
    columns = down.shape[2 if options["down_transposed"] else 1]
    pairs = ids.shape[0] * ids.shape[1]
    tiles = (1,) if x.device.type == "cpu" else (len(TILE_ROWS), pairs // TILE_ROWS[0] + up.shape[0] + 2, 4)
    shapes = ((pairs,), (up.shape[0] + 1,), tiles)
    order, offsets, listed = (ids.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return x.new_empty(x.shape[0], columns), order, offsets, listed


@torch.library.custom_op("sparsec::bank_backward", mutates_args=(), schema=BACKWARD)
def bank_backward(
    y_grad: Tensor, x: Tensor, order: Tensor, offsets: Tensor, tiles: Tensor, weights: Tensor, *banks: Tensor | None,
    needed: Sequence[bool], **options: Any,
) -> list[Tensor]:  # fmt: skip
    kind = kind_of([y_grad, x, weights, *banks], 3, options)
    listed = tiles if tiles.dim() > 1 else None  # on a CPU there are none
    return _backward(kind, tuple(needed))([y_grad, x, weights, order, offsets, listed, *banks])


@bank_backward.register_fake
def _backward_fake(
    y_grad: Tensor, x: Tensor, order: Tensor, offsets: Tensor, tiles: Tensor, weights: Tensor, *banks: Tensor | None,
    needed: Sequence[bool], **options: Any,
) -> list[Tensor]:  # fmt: skip
    return [
        tensor.new_empty(tensor.shape)
        for tensor, needs in zip((x, weights, *banks), needed, strict=True)
        if needs and tensor is not None
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: Mapping[str, Any], output: Any) -> None:
    x, _, weights, *banks = inputs
    _, *sort = output
    ctx.save_for_backward(x, *sort, weights, *banks)
    ctx.options = keyword_only_inputs


def _grads(ctx: Any, y_grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x_needs, _, *rest = ctx.needs_input_grad
    needed = [x_needs, *rest]
    if y_grad is None or not any(needed):
        return (None,) * (1 + len(needed))
    made = iter(torch.ops.sparsec.bank_backward(y_grad, *ctx.saved_tensors, needed=needed, **ctx.options))
    x_grad, *grads = [next(made) if needs else None for needs in needed]
    return x_grad, None, *grads


bank.register_autograd(_grads, setup_context=_setup)

TARGET = torch.ops.sparsec.bank.default
"""The operator, as it stands in a graph."""
