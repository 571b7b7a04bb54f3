"""Lowered modules, made op by op, for tests of emission and of the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsec.dialects import moe
from sparsec.dialects.dtypes import from_torch
from sparsec.ir.core import Argument, Attr, Block, Func, Module, Value
from sparsec.ir.opdef import OpDef, make
from sparsec.ir.types import Sym, SymType, TensorType, Type

T, R, S0 = Sym("t"), Sym("r"), Sym("s0")


def tensor_type(*shape: int | Sym, dtype: torch.dtype = torch.float32) -> TensorType:
    return TensorType(shape, from_torch(dtype))


def add(block: Block, name: str, operands: Sequence[Argument], types: Sequence[Type] | None, **attrs: Any) -> OpDef:
    """Append an op; `regions` among the keywords are its regions."""
    regions: Any = attrs.pop("regions", ())
    op = make(name, operands, types, attrs, regions)
    block.append(op)
    return op


def activation(width: int, dtype: torch.dtype, layout: str = "concat") -> Block:
    """silu(gate) * up, or silu alone for an undivided projection."""
    row = tensor_type(R, width, dtype=dtype)
    block = Block([row] if layout == "single" else [row, row], ["a", "b"])
    out = add(block, "aten.silu", [block.args[0]], [row]).result
    if layout != "single":
        out = add(block, "aten.mul.Tensor", [out, block.args[1]], [row]).result
    add(block, "moe.yield", [out], ())
    return block


def router(logits: TensorType, k: int, scores: torch.dtype) -> Block:
    """Softmax, top-k, renormalise."""
    block = Block([logits], ["z"])
    tokens, experts = logits.shape
    wide, few = tensor_type(tokens, experts, dtype=scores), tensor_type(tokens, k, dtype=scores)
    p = add(block, "aten.softmax.int", [block.args[0]], [wide], dim=-1, dtype=from_torch(scores)).result
    best, ids = add(block, "aten.topk", [p], [few, tensor_type(tokens, k, dtype=torch.int64)], k=k).results
    one = tensor_type(tokens, 1, dtype=scores)
    total = add(block, "aten.sum.dim_IntList", [best], [one], dim=(-1,), keepdim=True).result
    weights = add(block, "aten.div.Tensor", [best, total], [few]).result
    add(block, "moe.yield", [ids, weights], ())
    return block


@dataclass
class Layer:
    """Sizes and kinds of an expert layer."""

    hidden: int = 32
    width: int = 48
    experts: int = 6
    k: int = 2
    dtype: torch.dtype = torch.float32
    layout: str = "concat"
    up_transposed: bool = False
    down_transposed: bool = False
    bias: bool = False
    variants: tuple[dict[str, Attr], ...] = ()
    backend: str = "onednn"
    seed: int = 0
    weights: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        parts = 1 if self.layout == "single" else 2

        def draw(*shape: int, scale: float) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(self.dtype)

        up = draw(self.experts, parts * self.width, self.hidden, scale=self.hidden**-0.5)
        down = draw(self.experts, self.hidden, self.width, scale=self.width**-0.5)
        self.weights = {
            "gate": draw(self.experts, self.hidden, scale=self.hidden**-0.5),
            "up": up.mT.contiguous() if self.up_transposed else up,
            "down": down.mT.contiguous() if self.down_transposed else down,
        }
        if self.bias:
            self.weights["up_bias"] = draw(self.experts, parts * self.width, scale=0.1)
            self.weights["down_bias"] = draw(self.experts, self.hidden, scale=0.1)

    def type_of(self, name: str) -> TensorType:
        return tensor_type(*self.weights[name].shape, dtype=self.dtype)

    def types(self, tokens: Sym) -> dict[str, TensorType]:
        pairs = Sym(f"{self.k}*{tokens}")
        return {
            "x": tensor_type(tokens, self.hidden, dtype=self.dtype),
            "logits": tensor_type(tokens, self.experts, dtype=self.dtype),
            "ids": tensor_type(tokens, self.k, dtype=torch.int64),
            "weights": tensor_type(tokens, self.k),
            "order": tensor_type(pairs, dtype=torch.int32),
            "offsets": tensor_type(self.experts + 1, dtype=torch.int32),
            "h": tensor_type(pairs, self.width, dtype=self.dtype),
        }

    def kernels(self) -> list[Func]:
        """Route and group, gathered GEMM, GEMM and combine, as `lower` leaves them."""
        types = self.types(T)
        attrs: dict[str, Any] = {"backend": self.backend, "tokens": T}
        bias = ["up_bias"] if self.bias else []
        down_bias = ["down_bias"] if self.bias else []

        def func(
            name: str, op: str, operands: list[str], results: list[str], regions: list[Block], **more: Any
        ) -> Func:
            block = Block([types.get(o) or self.type_of(o) for o in operands], operands)
            made = add(block, op, block.args, [types[r] for r in results], regions=regions, **more)
            add(block, "func.return", made.results, ())
            return Func(name, block, attrs)

        more: dict[str, Any] = {"variants": self.variants} if self.variants else {}
        up = {"k": self.k, "layout": self.layout, "up_transposed": self.up_transposed, **more}
        down = {"down_transposed": self.down_transposed, **more}
        body = router(types["logits"], self.k, torch.float32)
        act = activation(self.width, self.dtype, self.layout)
        return [
            func(
                "route_group_0",
                "moe.route_group",
                ["logits"],
                ["ids", "weights", "order", "offsets"],
                [body],
                num_experts=self.experts,
            ),
            func("gather_gemm_0", moe.GatherGemm.op_name, ["x", "order", "offsets", "up", *bias], ["h"], [act], **up),
            func(
                "gemm_combine_0",
                "moe.gemm_combine",
                ["h", "order", "offsets", "weights", "down", *down_bias],
                ["x"],
                [],
                **down,
            ),
        ]


def launch(block: Block, callee: str, operands: Sequence[Value], types: Sequence[Type]) -> tuple[Value, ...]:
    buffers = tuple(add(block, "kernel.alloc", [], [type]).result for type in types)
    return add(block, "kernel.launch", [tuple(operands), buffers], types, callee=callee).results


def layer_module(layer: Layer) -> Module:
    """x [s0, H] -> the layer's output and its logits."""
    types = layer.types(S0)
    names = list(layer.weights)
    block = Block([types["x"], *map(layer.type_of, names)], ["x", *names])
    args = dict(zip(["x", *names], block.args, strict=True))
    logits = add(block, "aten.linear", [args["x"], args["gate"]], [types["logits"]]).result
    routed = launch(block, "route_group_0", [logits], [types[n] for n in ("ids", "weights", "order", "offsets")])
    _, weights, order, offsets = routed
    bias = [args["up_bias"]] if layer.bias else []
    down_bias = [args["down_bias"]] if layer.bias else []
    (h,) = launch(block, "gather_gemm_0", [args["x"], order, offsets, args["up"], *bias], [types["h"]])
    operands = [h, order, offsets, weights, args["down"], *down_bias]
    (y,) = launch(block, "gemm_combine_0", operands, [types["x"]])
    add(block, "func.return", [y, logits], ())
    main = Func("main", block)
    main.arg_attrs = {args[name]: {"kind": "param", "source": name} for name in names}
    return Module([main, *layer.kernels()], {"phase": "lower"})


def cache_module(length: int = 4, width: int = 3) -> Module:
    """Write `x` [1, width] into row `at` of the buffer `cache` and return the sum of its rows."""
    cache_type, row = tensor_type(length, width), tensor_type(1, width)
    block = Block([row, tensor_type(1, dtype=torch.int64), cache_type], ["x", "at", "cache"])
    x, at, cache = block.args
    new = add(block, "aten.index_copy", [cache, at, x], [cache_type], dim=0).result
    total = add(block, "aten.sum.dim_IntList", [new], [tensor_type(width)], dim=(0,)).result
    add(block, "func.return", [total, new], ())
    main = Func("main", block)
    main.arg_attrs = {cache: {"kind": "buffer", "source": "cache"}}
    main.result_attrs = {1: {"kind": "mutation", "source": "cache"}}
    return Module([main], {"phase": "lower"})


def arange_module() -> Module:
    """x [s0, 4] and an integer s1 -> x + s1 * arange(s0)[:, None], and where it is not zero: sizes of every kind."""
    s1, u0 = Sym("s1"), Sym("u0")
    x_type = tensor_type(S0, 4)
    block = Block([x_type, SymType(s1)], ["x", "n"])
    x = block.args[0]
    rows = add(block, "aten.arange", [], [tensor_type(S0)], end=S0, dtype=from_torch(torch.float32)).result
    column = add(block, "aten.reshape", [rows], [tensor_type(S0, 1)], shape=(S0, 1)).result
    scaled = add(block, "aten.mul.Scalar", [column], [tensor_type(S0, 1)], other=s1).result
    y = add(block, "aten.add.Tensor", [x, scaled], [x_type]).result
    found = add(block, "aten.nonzero", [y], [tensor_type(u0, 2, dtype=torch.int64)]).result
    flat_type = tensor_type(Sym("2*u0"), dtype=torch.int64)
    flat = add(block, "aten.reshape", [found], [flat_type], shape=(Sym("2*u0"),)).result
    add(block, "func.return", [y, flat], ())
    return Module([Func("main", block)], {"phase": "lower"})
