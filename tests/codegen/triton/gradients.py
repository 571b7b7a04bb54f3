"""Banks for the tests of backward kernels: their operands, and what autograd makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.differentiable import WITH_GRADIENT, Kind, kind_of
from sparsec.frontend import region
from sparsec.frontend.derivative import gradient
from sparsec.ir.core import Module


def silu(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def clamped(z: Tensor) -> Tensor:
    gate, up = z[..., ::2].clamp(max=7.0), z[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def gelu(z: Tensor) -> Tensor:
    return torch.nn.functional.gelu(z, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"concat": silu, "interleaved": clamped, "single": gelu}
"""By layout."""


@dataclass(frozen=True)
class Bank:
    """A bank of experts, in shape only."""

    experts: int
    k: int
    hidden: int = 40
    width: int = 24
    layout: str = "concat"
    bias: bool = False
    up_transposed: bool = False
    down_transposed: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def options(self) -> dict[str, Any]:
        gated = self.layout != "single"
        _, text = region.record(ACTIVATIONS[self.layout], self.width, gated, self.dtype)
        back = region.encode(gradient(region.decode(text)))
        flags = {"up_transposed": self.up_transposed, "down_transposed": self.down_transposed}
        return {"activation": text, "gradient": back, "layout": self.layout, **flags}

    def operands(self, ids: Tensor) -> dict[str, Tensor | None]:
        """Random ones, of the bank's dtype but for the weights, which are NaN where a pair is skipped."""
        experts, hidden, width = self.experts, self.hidden, self.width
        columns = width if self.layout == "single" else 2 * width
        weights = torch.rand(ids.shape)
        weights = torch.where((ids < 0) | (ids >= experts), torch.nan, weights)
        up = torch.randn((experts, hidden, columns) if self.up_transposed else (experts, columns, hidden)) * 0.3
        down = torch.randn((experts, width, hidden) if self.down_transposed else (experts, hidden, width)) * 0.3
        biases = [torch.randn(experts, size) if self.bias else None for size in (columns, hidden)]
        given = (torch.randn(ids.shape[0], hidden), up, down, *biases)
        x, *banks = [None if tensor is None else tensor.to(self.dtype) for tensor in given]
        return dict(zip(WITH_GRADIENT, (x, weights, *banks), strict=True))

    def kinds(self) -> tuple[Kind, Kind]:
        """For the forward and the backward program."""
        with torch.device("meta"):
            ids = torch.zeros(1, self.k, dtype=torch.int64)
            x, weights, *banks = self.operands(ids).values()
        operands = ([x, ids, weights, *banks], [x, x, weights, *banks])
        return kind_of(operands[0], 3, self.options), kind_of(operands[1], 3, self.options)


def expected(bank: Bank, ids: Tensor, operands: dict[str, Tensor | None], y_grad: Tensor) -> dict[str, Tensor]:
    """Result (`y`) and gradients by autograd in f64: pair by pair, as simply as can be."""
    given = {name: None if value is None else value.double().requires_grad_() for name, value in operands.items()}
    x, weights, up, down, up_bias, down_bias = given.values()
    assert x is not None and weights is not None and up is not None and down is not None
    rows = [torch.zeros(bank.hidden, dtype=torch.float64) + 0 * x.sum() for _ in range(ids.shape[0])]
    for token, slot in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
        e = int(ids[token, slot])
        if not 0 <= e < bank.experts:
            continue
        z = x[token] @ (up[e] if bank.up_transposed else up[e].T) + (0 if up_bias is None else up_bias[e])
        a = ACTIVATIONS[bank.layout](z)
        y = a @ (down[e] if bank.down_transposed else down[e].T) + (0 if down_bias is None else down_bias[e])
        rows[token] = rows[token] + weights[token, slot] * y
    y = torch.stack(rows) if rows else x * 1
    wanted = [value for value in given.values() if value is not None]
    grads = torch.autograd.grad(y, wanted, y_grad.double(), materialize_grads=True)
    names = [name for name, value in given.items() if value is not None]
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


TINY = {"block_m": 16, "block_n": 16, "block_k": 32, "num_warps": 4, "num_stages": 2}


def with_variants(module: Module, *variants: dict[str, Any]) -> Module:
    """A lowered module whose GEMMs have these variants; the families that they name are those of gradients."""
    given = variants or (TINY,)
    plain = tuple({name: value for name, value in variant.items() if name != "kernel"} for variant in given)
    for name, func in module.funcs.items():
        op = func.body.ops[0]
        if name != "main" and op.name != "moe.group":
            op.attrs["variants"] = given if op.name.endswith("_grad") else plain
    return module
