"""Layers of any size and kind as text, their native kernels, and what they compute in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec import pipeline
from sparsec.codegen.cpu import compiler
from sparsec.codegen.emit import Emitted, emit
from sparsec.ir.core import Module
from sparsec.ir.interp import DerivedWeights
from sparsec.ir.parser import parse_module
from sparsec.runtime import isa as processor
from sparsec.runtime import tiles
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.executor import Program
from tests.codegen.cpu import sanitize

HERE = tuple(isa for isa in compiler.isas() if isa in processor.processor())
"""Instruction sets that are compiled for and run here, best first."""

EPS = 1e-5
Values: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class Experts:
    """A layer. With `router` it takes logits, chooses itself and gives the probabilities too; else it takes ids."""

    dtype: str
    experts: int
    hidden: int
    width: int
    k: int
    parts: int = 2
    weights: str = "model"
    up_bias: bool = False
    down_bias: bool = False
    early: bool = False
    tail: bool = False
    router: bool = False
    ids: str = "i64"
    scores: str = "f32"
    activations: str = "model"

    def types(self) -> dict[str, str]:
        """The inputs, then the weights, by name."""
        e, h, i, k, dtype = self.experts, self.hidden, self.width, self.k, self.dtype
        chosen = {"ids": f"s0x{k}x{self.ids}", "w": f"s0x{k}x{self.scores}"}
        made = {"x": f"s0x{h}x{dtype}", **({"logits": f"s0x{e}x{self.scores}"} if self.router else chosen)}
        made |= {"up": f"{e}x{self.parts * i}x{h}x{dtype}", "down": f"{e}x{h}x{i}x{dtype}"}
        made |= {"ub": f"{e}x{self.parts * i}x{dtype}"} if self.up_bias else {}
        made |= {"db": f"{e}x{h}x{dtype}"} if self.down_bias else {}
        return made | ({"n": f"{h}x{dtype}"} if self.tail else {})

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("x", "logits") if self.router else ("x", "ids", "w")

    def text(self) -> str:
        """The layer as it comes out of `raise`."""
        h, k, e, dtype = self.hidden, self.k, self.experts, self.dtype
        y, ids, w = f"tensor<s0x{h}x{dtype}>", f"tensor<s0x{k}x{self.ids}>", f"tensor<s0x{k}x{self.scores}>"
        p, inner, row = f"tensor<s0x{e}x{self.scores}>", f"tensor<rx{self.width}x{dtype}>", f"tensor<rx{h}x{dtype}>"
        head = ", ".join(
            f"%{name}: tensor<{type}>" + ("" if name in self.inputs else f' {{kind = "param", source = "{name}"}}')
            for name, type in self.types().items()
        )
        route = f"""
  %ids, %w, %p = moe.route(%logits) : {ids}, {w}, {p} {{
    body(%z: {p}):
      %q = aten.softmax.int(%z) {{dim = -1}} : {p}
      %v, %c = aten.topk(%q) {{k = {k}}} : {w}, {ids}
      yield %c, %v, %q
  }}"""
        single = f"""
    activation(%a: {inner}):
      %m = aten.silu(%a) : {inner}
      yield %m"""
        gated = f"""
    activation(%a: {inner}, %b: {inner}):
      %g = aten.silu(%a) : {inner}
      %m = aten.mul.Tensor(%g, %b) : {inner}
      yield %m"""
        norm = f"""
    tail(%y: {row}, %n: tensor<{h}x{dtype}>):
      %s = aten.mul.Tensor(%y, %y) : {row}
      %m = aten.mean.dim(%s) {{dim = [-1], keepdim = true}} : tensor<rx1x{dtype}>
      %e = aten.add.Scalar(%m) {{other = {EPS}}} : tensor<rx1x{dtype}>
      %i = aten.rsqrt(%e) : tensor<rx1x{dtype}>
      %t = aten.mul.Tensor(%y, %i) : {row}
      %q = aten.mul.Tensor(%t, %n) : {row}
      yield %q"""
        operands = ["%x", "%ids", "%w", "%up", "%down", "%ub" if self.up_bias else "none"]
        operands += ["%db" if self.down_bias else "none", "none", "none", *(["%n"] if self.tail else [])]
        attrs = [*(['layout = "single"'] if self.parts == 1 else []), *(['weight_on = "input"'] if self.early else [])]
        written = f" {{{', '.join(attrs)}}}" if attrs else ""
        while operands[-1] == "none":
            operands.pop()
        results, returned = (f"({y}, {ids}, {w}, {p})", "%y, %ids, %w, %p") if self.router else (f"({y})", "%y")
        return f"""module {{phase = "raise", weights = "{self.weights}", activations = "{self.activations}"}}
func @main({head}) -> {results} {{{route if self.router else ""}
  %y = moe.experts({", ".join(operands)}){written} : {y} {{{gated if self.parts == 2 else single}{norm if self.tail else ""}
  }}
  return {returned}
}}"""  # noqa: E501

    def drawn(self, tokens: int, seed: int = 0) -> dict[str, Tensor]:
        """Values by name: banks so that rows keep their size, ids that do not repeat within a row."""
        generator, made = torch.Generator().manual_seed(seed), dict[str, Tensor]()
        for name, type in self.types().items():
            *shape, dtype = type.split("x")
            sizes = [tokens if size == "s0" else int(size) for size in shape]
            if name == "ids":
                made[name] = torch.rand(tokens, self.experts, generator=generator).argsort(1)[:, : self.k].contiguous()
            elif name == "w":
                made[name] = torch.rand(sizes, generator=generator) + 0.1
            else:
                scale = sizes[2] ** -0.5 if name in ("up", "down") else 1.0
                made[name] = torch.randn(sizes, generator=generator) * scale
            made[name] = made[name].to(DTYPES[dtype])
        return made

    def stored(self, values: Values) -> dict[str, Tensor]:
        """The same values with the banks as quantised ones are read: f32."""
        if self.weights == "model":
            return dict(values)
        packing, made = self.weights, dict(values)
        for name, parts in (("up", self.parts), ("down", 1)):
            scales = tiles.find_scales(values[name], parts, packing=packing)
            packed = tiles.pack(values[name], parts, packing=packing, scales=scales)
            _, columns, inner = values[name].shape
            made[name] = tiles.unpack(packed, scales, packing, parts, columns, inner)
        return made

    def plain(self, values: Values, dtype: torch.dtype) -> Tensor:
        """y, expert by expert, with everything but ids in `dtype`."""
        of = {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}
        x, up, down = of["x"], of["up"], of["down"]
        tokens, ids, w = x.shape[0], values["ids"], of["w"]
        slots = torch.zeros(tokens, self.k, self.hidden, dtype=dtype)
        for e in range(self.experts):
            token, slot = (ids == e).nonzero(as_tuple=True)
            rows = x[token] if self.activations == "model" else rounded(x[token], self.hidden)
            if self.early:
                rows = rows * w[token, slot, None]
            h = F.linear(rows, up[e], of["ub"][e] if self.up_bias else None)
            gate, *rest = h.chunk(self.parts, 1)
            h = F.silu(gate) * rest[0] if rest else F.silu(gate)
            if self.activations == "int8":
                h = rounded(h.to(DTYPES[self.dtype]).to(dtype), 128)
            y = F.linear(h, down[e], of["db"][e] if self.down_bias else None)
            if self.tail:
                y = y * (y * y).mean(1, keepdim=True).add(EPS).rsqrt() * of["n"]
            slots[token, slot] = y if self.early else y * w[token, slot, None]
        return slots.sum(1)


@cache
def lowered(layer: Experts) -> Module:
    return pipeline.run(parse_module(layer.text()), target="cpu").module


@cache
def emitted(layer: Experts, isa: str) -> Emitted:
    """The plan and files of a layer, with one library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEC_ISAS", isa)
        made = emit(lowered(layer), "cpu")
    assert not made.remarks
    assert {file.split(".")[1] for file in made.files if file.endswith(".so")} == {isa}
    return made


class Native:
    """A layer's native kernel with the banks of some values; `calls` give all results."""

    def __init__(self, layer: Experts, isa: str, values: Values) -> None:
        made = emitted(layer, isa)
        self.layer = layer
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPARSEC_ISAS", isa)
            self.program = Program(made.plan, DerivedWeights(lowered(layer), values), files=made.files)
        assert [(path.isa, path.why) for path in self.program.paths.values()] == [(isa, "")]

    def __call__(self, values: Values) -> list[Tensor]:
        return self.program(*(values[name] for name in self.layer.inputs))


def sanitized(
    layer: Experts, isa: str, values: Values, threads: int = 1, sanitizers: str = sanitize.MEMORY
) -> list[Tensor]:
    """The results of the kernel as a program of its own under sanitizers."""
    from sparsec.runtime.plan import Launch

    made = emitted(layer, isa)
    (launch,) = (step for step in made.plan.steps if isinstance(step, Launch))
    kernel, derived, tokens = made.plan.kernels[launch.kernel], DerivedWeights(lowered(layer), values), len(values["x"])
    held = {arg.slot: values[arg.name] if arg.kind == "input" else derived[arg.source] for arg in made.plan.args}
    outs = [((tokens, *map(int, result.shape[1:])), DTYPES[result.dtype]) for result in kernel.results]
    assert kernel.source is not None
    return sanitize.run(
        made.files[kernel.source].decode(),
        isa,
        tokens=tokens,
        ins=[None if slot is None else held[slot] for slot in launch.ins],
        outs=outs,
        threads=threads,
        sanitizers=sanitizers,
    )


def rounded(rows: Tensor, group: int) -> Tensor:
    """Rows whose values in each group of columns are multiples of their largest / 127."""
    groups = F.pad(rows, (0, -rows.shape[1] % group)).unflatten(1, (-1, group))
    step = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((groups / step).round() * step).flatten(1)[:, : rows.shape[1]]


def near(layer: Experts, got: Tensor, values: Values) -> None:
    """Within 1e-5 of f64 where rows are f32; in bf16 no further from f64 than PyTorch's own bf16 is, times 1.1."""
    stored = layer.stored(values)
    exact = layer.plain(stored, torch.float64)
    assert (got.shape, got.dtype) == (exact.shape, DTYPES[layer.dtype])
    error, size = (got.double() - exact).norm(dim=1), exact.norm(dim=1)
    if layer.dtype == "f32":
        assert bool((error <= 1e-5 * (size + size.mean())).all())
        return
    if layer.activations == "int8":  # what lies half way between two steps may be rounded either way
        assert error.norm() <= 8e-3 * size.norm()
        return
    eager = (layer.plain(stored, torch.bfloat16).double() - exact).norm()
    few = 2**-9 * size.norm() if got.numel() < 1000 else 0.0
    assert error.norm() <= 1.1 * eager + few


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
