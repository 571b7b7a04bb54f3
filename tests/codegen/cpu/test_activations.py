"""Activations as generated C++ against the interpreter, and the functions that they call against f64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsec.codegen.cpu import regions
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Block
from sparsec.ir.types import Sym
from tests.codegen.cpu import sanitize
from tests.codegen.cpu.native_regions import Case, isas, run, source
from tests.codegen.triton.build import region

EDGES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, 88.7, -88.7, 89.0, -89.0, 104.0, -104.0, 1e38, -1e38]
ENDS = [float("inf"), float("-inf"), float("nan")]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def masked(gate: Tensor, up: Tensor) -> Tensor:
    return torch.where((gate > 0.5) & ~(up < 0), gate, torch.zeros_like(up)).masked_fill(up > 3, -1.0)


def powers(x: Tensor) -> Tensor:
    return x.pow(2) - x.pow(3) + x.abs().pow(1.7) + (x.abs() + 1).pow(-0.5) + torch.pow(2.0, x.clamp(-9, 9))


def arithmetic(x: Tensor, y: Tensor) -> Tensor:
    z = torch.add(x, y, alpha=0.5) / (y.abs() + 1) - 3 + torch.maximum(x, y) * torch.minimum(x, y).neg()
    return z + (x.floor() - y.ceil() + x.round() - y.trunc()) * torch.sign(y) + (x >= y).to(x.dtype) * 2


def branches(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=1.0, posinf=2.0, neginf=3.0) + x.isnan() * 5 + torch.isfinite(x) - x.isinf().int()


PLAIN: dict[str, Callable[..., Tensor]] = {
    "swiglu": swiglu,
    "gpt_oss": gpt_oss,
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "geglu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "reglu": lambda gate, up: F.relu(gate) * up,
    "relu2": lambda x: F.relu(x).square(),
    "masked": masked,
    "powers": powers,
    "arithmetic": arithmetic,
    "branches": branches,
    "softplus": lambda x: F.softplus(x, beta=2.0, threshold=5.0),
    "log_sigmoid": F.logsigmoid,
    "elu": lambda x: F.elu(x, 0.7),
    "celu": lambda x: F.celu(x, 1.3),
    "selu": F.selu,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "softsign": F.softsign,
    "threshold": lambda x: F.threshold(x, 0.1, 20.0),
    "logs": lambda x: torch.log(x.abs() + 1) + torch.log1p(x.abs()) + torch.log2(x.abs() + 2) + x.expm1(),
    "constant": torch.ones_like,
    "half": lambda x: (x.bfloat16() * 1.5).float(),
}  # fmt: skip


GATED = ("swiglu", "gpt_oss", "geglu", "geglu_tanh", "reglu", "masked", "arithmetic")


def of_transformers() -> dict[str, Callable[..., Tensor]]:
    """Transformers' activations without weights of their own."""
    from transformers.activations import ACT2FN

    made = {name: ACT2FN[name] for name in ACT2FN}
    return {name: fn for name, fn in made.items() if isinstance(fn, nn.Module) and not list(fn.parameters())}


def values(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(30, 16, generator=generator) * torch.logspace(-4, 2, 30)[:, None]
    return torch.cat([drawn.flatten(), torch.tensor([*EDGES, *ENDS])]).view(-1, 16)


@cache
def cases() -> dict[str, Case]:
    found = dict[str, Case]()
    for name, fn in {**of_transformers(), **PLAIN}.items():
        parts = 2 if name in GATED else 1
        inputs = [values(), values(1).flip(0)][:parts]
        found[name] = Case("activation", region(fn, *inputs, rows=[True] * parts, symbol=Sym("r")), inputs)
    return found


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_activations(isa: str) -> None:
    wrong = list[str]()
    for (name, case), (got,) in zip(cases().items(), run(list(cases().values()), isa), strict=True):
        wanted = case.wanted()[0].float()
        # Near -inf a few of PyTorch's vectorised forms give NaN where the function has a limit.
        sane = torch.stack([x.isfinite() for x in case.inputs]).all(0) | ~wanted.isnan()
        tolerance = 1e-2 if name == "half" else 4e-6
        if not torch.allclose(got[sane], wanted[sane], rtol=tolerance, atol=tolerance / 4, equal_nan=True):
            at = (~torch.isclose(got, wanted, rtol=tolerance, atol=tolerance / 4, equal_nan=True) & sane).nonzero()[0]
            there = [x[tuple(at)].item() for x in case.inputs]
            wrong.append(f"{name}({there}) = {got[tuple(at)].item()}, not {wanted[tuple(at)].item()}")
    assert not wrong


@cache
def silu_times() -> Block:
    x = torch.randn(1, 16)
    return region(swiglu, x, x, rows=[False, False])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32, min_value=-200, max_value=200), min_size=16, max_size=16))
def test_any_finite_values(numbers: list[float]) -> None:
    block = silu_times()
    x = torch.tensor(numbers)[None]
    case = Case("activation", block, [x, x.flip(1)])
    got = run([case], next(iter(isas()), "avx2"))[0][0]
    torch.testing.assert_close(got, case.wanted()[0], rtol=1e-6, atol=1e-35)


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "log": torch.log,
    "log2": torch.log2,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "pow(1.7)": lambda x: torch.pow(x, float(torch.tensor(1.7))),
    "pow(-5)": lambda x: torch.pow(x, -5.0),
}


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
def test_functions_are_within_two_units_in_the_last_place(isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (1 << 14,), generator=generator).to(torch.int32).view(torch.float32)
    usual = torch.randn(1 << 13, generator=generator) * 10
    x = torch.cat([bits, usual, torch.rand(1 << 13, generator=generator), torch.tensor([*EDGES, *ENDS])]).view(-1, 16)
    tried = [Case("activation", region(fn, x[:3], rows=[True], symbol=Sym("r")), [x]) for fn in EXACT.values()]
    for (name, fn), (got,) in zip(EXACT.items(), run(tried, isa), strict=True):
        exact = fn(x.double())
        wanted = exact.float()
        place = (torch.nextafter(wanted.abs(), torch.tensor(float("inf"))) - wanted.abs()).double()
        # Where exp(-x) overflows f32, a sigmoid below 1e-38 is 0, as PyTorch's own is.
        known = wanted.isfinite() & (wanted.abs() < 3.4e38) & ~((x < -88) & (name == "sigmoid"))
        error = ((got.double() - exact).abs() / place)[known]
        assert error.max() <= 2, f"{name} is {error.max():.2f} units off at {x[known][error.argmax()].item()!r}"
        ends = ~wanted.isfinite()
        assert torch.equal(got.isnan()[ends], wanted.isnan()[ends]), name
        assert torch.equal(got[ends].nan_to_num(0.0), wanted[ends].nan_to_num(0.0)), name


def test_rounding_to_narrow_types() -> None:
    """Every pattern of 16 bits, halfway cases and their neighbours round as PyTorch rounds them."""
    for dtype in (torch.bfloat16, torch.float16):
        short = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        exact = short.float()
        half = torch.cat([exact, (exact + exact.roll(-1)) / 2])
        tried = torch.cat([half, half.nextafter(torch.tensor(1.0)), half.nextafter(torch.tensor(-9e9))]).view(-1, 16)

        def routed(z: Tensor, dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor, Tensor]:
            return z.topk(1)[1], z.topk(1)[0], z.to(dtype)

        def read(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return z.topk(1)[1], z.topk(1)[0], z.float()

        stored = Case("router", region(routed, tried[:3], rows=[True]), [tried])
        loaded = Case("router", region(read, short.view(-1, 16)[:3], rows=[True]), [short.view(-1, 16)])
        narrow, wide = (results[2] for results in run([stored, loaded], next(iter(isas()), "avx2")))
        torch.testing.assert_close(narrow, tried.to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(wide.flatten(), exact, rtol=0, atol=0, equal_nan=True)


def test_under_sanitizers() -> None:
    if why := sanitize.missing("avx2"):
        pytest.skip(why)
    every = list(cases().values())
    outs: list[sanitize.Result] = [(tuple(t.shape), t.dtype) for case in every for t in case.results()]
    ins = [tensor for case in every for tensor in case.inputs]
    sanitize.run(source(every), "avx2", tokens=1, ins=ins, outs=outs)


def test_text_reads_like_the_model() -> None:
    text = regions.activation(cases()["gpt_oss"].block)
    assert text.startswith("static inline F32 activation(F32 p0, F32 p1) {\n  // ")
    assert "min(p0, splat(7.0f))" in text
    assert "sigmoid(" in text


def refused(fn: Callable[..., Any]) -> str:
    with pytest.raises(CompileError) as caught:
        regions.activation(region(fn, torch.randn(3, 16), rows=[True], symbol=Sym("r")))
    return str(caught.value)


def test_what_no_kernel_holds_is_said_with_its_line() -> None:
    said = refused(torch.special.i0)
    assert "no C++ kernel for 'aten.special_i0'" in said or "no C++ kernel for 'aten.i0'" in said
    assert "build.py" in said
    assert "softmax" in refused(lambda x: x.softmax(-1))
    assert "f64 is not computed" in refused(lambda x: x.double().tanh().float())
