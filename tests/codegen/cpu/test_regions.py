"""Routers and tails as generated C++ against the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparsec.codegen.cpu import regions
from sparsec.diagnostics import CompileError
from sparsec.dialects.moe import RouteGroup
from sparsec.ir.types import Sym
from tests.codegen.cpu import sanitize
from tests.codegen.cpu.native_regions import Case, isas, run, same, source
from tests.codegen.triton.build import T, region
from tests.codegen.triton.handwritten_routers import HANDWRITTEN
from tests.codegen.triton.routers import ROUTERS, Router
from tests.passes.route_layers import HIDDEN, Layer, kernel_of
from tests.passes.test_route_patterns import Hash, joint, padded, read_elsewhere

BEST = next(iter(isas()), "avx2")
FINITE = 16


def logits(experts: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows of every sort: `FINITE` ordinary ones, then equal, huge, tiny and infinite ones, and what is no number."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(FINITE + 12, experts, generator=generator) * 2
    special = z[FINITE:]
    special[0], special[1] = 0.0, special[1].round()
    special[2, ::2], special[3, ::2] = -0.0, 0.0
    special[2, 1::2], special[3, 1::2] = 0.0, float("-inf")
    special[4], special[5, 0] = float("-inf"), float("inf")
    special[6] *= 1e4
    special[7] *= 1e-4
    special[8, experts // 2], special[9] = float("nan"), float("nan")
    special[10], special[11, 1:] = 3e38, float("-inf")
    return z.to(dtype)


def traced(router: Router, dtype: torch.dtype | None = None) -> Case:
    z = logits(router.experts, dtype or router.dtype)
    generator = torch.Generator().manual_seed(1)
    params = [torch.rand(shape, generator=generator) for shape in router.params]
    block = region(router, z, *params, rows=[True, *[False] * len(params)])
    for op in block.ops:  # `region` gives types its own name for the tokens
        shape = op.attrs.get("shape", op.attrs.get("size"))
        if isinstance(shape, tuple):
            named = tuple(T if isinstance(dim, Sym) else dim for dim in shape)
            op.attrs["shape" if "shape" in op.attrs else "size"] = named
    return Case("router", block, [z, *params])


def raised(layer: torch.nn.Module, *rows: Tensor, bank: int) -> Case:
    """The router of a layer as the passes find it."""
    func, operands = kernel_of(layer, torch.randn(5, HIDDEN), *(row[:5] for row in rows), bank=bank)
    op = func.body.ops[0]
    assert isinstance(op, RouteGroup)
    tokens = rows[0].shape[0] if rows else FINITE + 12
    inputs = [tensor.detach() for tensor in operands(torch.randn(tokens, HIDDEN), *rows)]
    if not rows:
        inputs[0] = logits(inputs[0].shape[1], inputs[0].dtype)
    return Case("router", op.body, inputs)


@cache
def routing(name: str) -> Case:
    """A router by its name, captured when it is asked for: each takes a second."""
    torch.manual_seed(0)
    if name in HANDWRITTEN:
        router = HANDWRITTEN[name]
        return raised(Layer(router, router.experts, router.params), bank=router.experts)
    if name.startswith("sizes_"):
        experts, k = map(int, name.split("_")[1:])
        return traced(Router(cast(Any, every_op), experts, options={"k": k}))
    match name:
        case "joint":
            return raised(Layer(joint, 10, ((8,),)), bank=8)
        case "read_elsewhere":
            return raised(Layer(read_elsewhere, 8), bank=8)
        case "padding":
            return raised(Layer(padded, 8), torch.rand(7) > 0.5, bank=8)
        case "hash":
            return raised(Hash(), torch.randint(0, 50, (7,)), bank=8)
        case _:
            half = name.removesuffix("_bf16")
            return traced(ROUTERS[half], torch.bfloat16 if half != name else None)


SIZES = [(1, 1), (3, 2), (16, 1), (16, 16), (17, 9), (40, 33), (128, 8), (256, 1), (256, 256)]


def every_op(z: Tensor, k: int) -> tuple[Tensor, ...]:
    """What mixes a row's elements, at sizes that do not fill vectors."""
    ids = z.topk(k, dim=-1)[1]
    least, order = torch.sort(z, dim=-1, stable=True)
    smallest = z.topk(k, dim=-1, largest=False)[1]
    weights = z.gather(1, ids)
    kept = torch.zeros_like(z).scatter(1, ids, weights)
    extras = (z.amax(-1, keepdim=True), z.amin(-1, keepdim=True), z.argmin(-1, keepdim=True), order, least, smallest)
    return ids, weights, kept, z.flip(-1), (z > 0).any(-1, keepdim=True), (z < 1).all(-1, keepdim=True), *extras


NAMES = [
    *ROUTERS, *(f"{name}_bf16" for name in ("mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3", "granitemoe", "phimoe",
                                             "deepseek_v4", "normed")),
    *HANDWRITTEN, "joint", "read_elsewhere", "padding", "hash", *(f"sizes_{e}_{k}" for e, k in SIZES),
]  # fmt: skip


ROWS_OF = {
    "sparsemax": slice(FINITE),  # the model itself fails on others
    **dict.fromkeys(("layer_normed", "affine_norm"), slice(FINITE + 10)),  # sums that overflow f32
}


def test_routers() -> None:
    """All of them in one library, made once."""
    wrong = list[str]()
    for name, got in zip(NAMES, run(list(map(routing, NAMES)), BEST), strict=True):
        made, rows = routing(name), ROWS_OF.get(name, slice(None))
        count = made.inputs[0].shape[0]
        inputs = [given[rows] if given.shape[:1] == (count,) else given for given in made.inputs]
        try:
            for one, other in zip(got, replace(made, inputs=inputs).wanted(), strict=True):
                same(one[rows], other)
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("isa", isas()[1:])
def test_other_instruction_sets(isa: str) -> None:
    names = ["deepseek_v3", "mixtral_bf16", "two_levels", "sizes_17_9"]
    chosen = list(map(routing, names))
    for case, got in zip(chosen, run(chosen, isa), strict=True):
        for one, other in zip(got, case.wanted(), strict=True):
            same(one, other)


VALUES = [0.0, -0.0, 1.0, -1.0, 1e-45, -3e38, float("inf"), float("-inf"), float("nan")]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_values(data: st.DataObject) -> None:
    sizes = [routing(f"sizes_{e}_{k}") for e, k in SIZES]
    palette = data.draw(st.lists(st.sampled_from(VALUES) | st.floats(width=32), min_size=1, max_size=12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    numbers = torch.tensor(palette)
    tried = list[Case]()
    for case in sizes:
        picked = torch.randint(len(palette), case.inputs[0].shape, generator=generator)
        tried.append(replace(case, inputs=[numbers[picked]]))
    for case, got in zip(tried, run(tried, BEST), strict=True):
        for one, other in zip(got, case.wanted(), strict=True):
            same(one, other)


def test_each_operation_rounds() -> None:
    """A product and a sum are two roundings, as in eager: scores that are equal there are equal here."""

    def scored(z: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        scores = z * scale + bias
        return scores.topk(2, dim=-1)[1], scores

    generator = torch.Generator().manual_seed(0)
    z, scale, bias = (torch.randn(shape, generator=generator) for shape in ((40, 8), (8,), (8,)))
    case = Case("router", region(scored, z, scale, bias, rows=[True, False, False]), [z, scale, bias])
    for isa in isas():
        ids, scores = run([case], isa)[0]
        wanted = z * scale + bias
        assert torch.equal(scores, wanted)
        assert torch.equal(ids, wanted.topk(2, dim=-1)[1])


@pytest.mark.parametrize("tokens", [1, 8])
def test_fixed_number_of_tokens(tokens: int) -> None:
    """As many tokens as experts: their sizes must not be taken for each other."""
    router = Router(ROUTERS["deepseek_v3"].fn, 8, ((8,),), {"k": 2, "groups": 4, "kept": 2})
    z, bias = torch.randn(tokens, 8), torch.rand(8)
    case = Case("router", region(router, z, bias, rows=[False, False]), [z, bias])
    for one, other in zip(run([case], BEST)[0], case.wanted(), strict=True):
        same(one, other)


@cache
def tails() -> list[Case]:
    def scaled_norm(y: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(y, (y.shape[-1],), weight, 1e-6)

    def spelled(y: Tensor, weight: Tensor) -> Tensor:
        return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))

    def layer_norm(y: Tensor, weight: Tensor) -> Tensor:
        return F.layer_norm(y, (y.shape[-1],), weight, weight)

    def squashed(y: Tensor, weight: Tensor) -> Tensor:
        return y.softmax(-1) * weight + y.abs().amax(-1, keepdim=True)

    generator, found = torch.Generator().manual_seed(0), list[Case]()
    for fn in (scaled_norm, spelled, layer_norm, squashed):
        for width in (64, 50, 2048):
            y, weight = torch.randn(5, width, generator=generator), torch.randn(width, generator=generator)
            block = region(fn, y, weight, rows=[True, False], symbol=Sym("r"))
            found.append(Case("tail", block, [y, weight]))
    y, weight = torch.randn(5, 48).bfloat16(), torch.rand(48).bfloat16()
    block = region(spelled, y, weight, rows=[True, False], symbol=Sym("r"))
    return [*found, Case("tail", block, [y.float(), weight])]


def test_tails() -> None:
    cases = tails()
    for case, (got,) in zip(cases[:-1], run(cases, BEST)[:-1], strict=True):
        same(got, case.wanted()[0])
    y, weight = (given.float() for given in cases[-1].inputs)
    same(run(cases, BEST)[-1][0], F.rms_norm(y, (48,), weight, 1e-6))  # f32 throughout, whatever the model's type


def test_a_tail_may_write_over_its_row() -> None:
    case = tails()[1]
    lines = [line.strip() for line in regions.tail(case.block).splitlines()]
    reads = [i for i, line in enumerate(lines) if "(const char*)y" in line]
    writes = [i for i, line in enumerate(lines) if "(char*)out" in line and "const" not in line.split("(char*)out")[0]]
    assert max(reads) < min(writes)


def test_under_sanitizers() -> None:
    """Each operand and result in a block of its own size."""
    if why := sanitize.missing("avx2"):
        pytest.skip(why)
    names = [name for name in NAMES if name.startswith("sizes")]
    names += [
        "deepseek_v3_bf16",
        "granitemoe",
        "phimoe",
        "two_levels",
        "unbound",
        "by_rank",
        "hash",
        "joint",
        "padding",
    ]
    every = [*(routing(name) for name in names), *tails()[::4]]
    outs: list[sanitize.Result] = [(tuple(t.shape), t.dtype) for case in every for t in case.results()]
    ins = [tensor for case in every for tensor in case.inputs]
    found = sanitize.run(source(every), "avx2", tokens=1, ins=ins, outs=outs)
    plain = [tensor for results in run(every, BEST) for tensor in results]
    for one, other in zip(found, plain, strict=True):
        same(one, other)


def refused(fn: Callable[..., Any], *args: Tensor) -> str:
    with pytest.raises(CompileError) as caught:
        regions.router(region(fn, *args, rows=[True, *[False] * (len(args) - 1)]))
    return str(caught.value)


def test_what_no_kernel_holds_is_said_with_its_line() -> None:
    z = torch.randn(5, 8)
    said = refused(lambda z: (z.topk(2)[1], torch.sin(z).topk(2)[0]), z)
    assert "no C++ kernel for 'aten.sin'" in said
    assert "build.py" in said
    assert "mixes tokens" in refused(lambda z: (z.topk(2)[1], z.reshape(-1)[:, None]), z)
    assert "along the axis of the tokens" in refused(lambda z: (z.topk(2)[1], z.softmax(0)), z)
    assert "f64 is not computed" in refused(lambda z: (z.topk(2)[1], z.double()), z)


def test_more_than_the_stack_holds() -> None:
    y = torch.randn(2, 1 << 17)
    block = region(lambda y: y.softmax(-1), y, rows=[True], symbol=Sym("r"))
    with pytest.raises(CompileError, match="more than fit on the stack"):
        regions.tail(block)


def test_text_reads_like_the_model() -> None:
    """Values keep their names; ops element by element are one loop; the user's lines are comments."""
    text = regions.router(routing("mixtral").block)
    assert "softmax<1, 8, 1>(" in text
    assert "top_k<1, 8, 1, 2, true>(" in text
    assert "// return self.fn(*args)   tests/codegen/triton/build.py" in text
    wide = traced(Router(lambda z: (z.topk(2)[1], torch.tanh(z.abs() * 2 + 1).sqrt()[:, :2]), 64))
    assert regions.router(wide.block).count("for (int i = 0; i < 64; i += LANES) {") == 1
