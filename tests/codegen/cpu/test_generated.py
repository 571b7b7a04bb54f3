"""Generated kernels of whole layers: against the interpreter, on any number of threads, and under sanitizers."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from sparsec import pipeline
from sparsec.codegen.cpu import compiler
from sparsec.codegen.emit import Emitted, emit
from sparsec.ir.core import Module
from sparsec.ir.interp import DerivedWeights, evaluate_module
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module
from sparsec.runtime import isa as processor
from sparsec.runtime.dims import Expr, compile_dim
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.executor import Program
from sparsec.runtime.plan import Launch
from tests.codegen.cpu import sanitize
from tests.codegen.layers import LAYERS, inputs

BANKS = ("up", "down", "ub", "db")
CASES = ["plain", "input", "tail", "input_and_tail", "capacity", "top_1"]
HERE = [isa for isa in compiler.isas() if isa in processor.processor()]
Layer = tuple[Module, Emitted]


@cache
def lowered(name: str, dtype: str) -> tuple[Module, tuple[str, ...]]:
    """A layer, its banks fixed and packed, and the names of its inputs."""
    module = parse_module(print_module(LAYERS[name].module()).replace("xf32>", f"x{dtype}>"))
    names = tuple(arg.name or "" for arg in module.main.body.args)
    for arg in module.main.body.args:
        if arg.name in BANKS:
            module.main.arg_attrs[arg] = {"kind": "param", "source": arg.name}
    return pipeline.run(module, target="cpu").module, names


@cache
def emitted(name: str, dtype: str, isa: str) -> Emitted:
    """The plan and files of a layer; `isa` is the one that $SPARSEC_ISAS names."""
    made = emit(lowered(name, dtype)[0], "cpu")
    assert {file.split(".")[1] for file in made.files if file.endswith(".so")} == {isa}
    return made


def drawn(name: str, dtype: str, tokens: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Banks by name, and the other inputs."""
    values = inputs(LAYERS[name].module(), tokens, seed=3)
    values = [value.to(DTYPES[dtype]) if value.is_floating_point() and value.dim() else value for value in values]
    by_name = dict(zip(lowered(name, dtype)[1], values, strict=True))
    banks = {key: value for key, value in by_name.items() if key in BANKS}
    return banks, [value for key, value in by_name.items() if key not in BANKS]


def run(name: str, dtype: str, isa: str, tokens: int, threads: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the native kernel and the interpreter make of a layer."""
    (low, _), made, (banks, rest) = lowered(name, dtype), emitted(name, dtype, isa), drawn(name, dtype, tokens)
    weights, before = DerivedWeights(low, banks), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        program = Program(made.plan, weights, files=made.files)
        assert {choice.why for choice in program.paths.values()} == {""}
        got = program(*rest)
    finally:
        torch.set_num_threads(before)
    return got, list(evaluate_module(low, rest, banks))


def sanitized(name: str, dtype: str, isa: str, tokens: int, threads: int, sanitizers: str) -> None:
    """Run a layer's C++ under sanitizers; it must make what the interpreter makes."""
    if why := sanitize.missing(isa, sanitizers):
        pytest.skip(why)
    (low, _), made, (banks, rest) = lowered(name, dtype), emitted(name, dtype, isa), drawn(name, dtype, tokens)
    (launch,) = (step for step in made.plan.steps if isinstance(step, Launch))
    weights, left = DerivedWeights(low, banks), iter(rest)
    held = {arg.slot: next(left) if arg.kind == "input" else weights[arg.source] for arg in made.plan.args}
    kernel = made.plan.kernels[launch.kernel]
    outs: list[sanitize.Result] = []
    for result in kernel.results:
        dims = map(compile_dim, result.shape)
        shape = tuple(dim({str(kernel.tokens): tokens}) if isinstance(dim, Expr) else dim for dim in dims)
        outs.append((shape, DTYPES[result.dtype]))
    assert kernel.source is not None
    got = sanitize.run(
        made.files[kernel.source].decode(),
        isa,
        tokens=tokens,
        ins=[None if slot is None else held[slot] for slot in launch.ins],
        outs=outs,
        threads=threads,
        sanitizers=sanitizers,
    )
    wanted = evaluate_module(low, rest, banks)[0]
    compare(got[0], wanted, dtype)


def compare(got: Tensor, wanted: Tensor, dtype: str) -> None:
    """Close in f32. In bf16 all but a few rows are: near a tie the router may choose another expert."""
    if dtype == "f32":
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        return
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    assert bool(got.isfinite().all())
    ours, theirs = got.double().flatten(1), wanted.double().flatten(1)
    close = (ours - theirs).norm(dim=1) <= 0.02 * theirs.norm(dim=1)
    assert close.double().mean() > 0.95


@pytest.fixture(params=HERE)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set that is compiled for and runs here, and the only one that is."""
    monkeypatch.setenv("SPARSEC_ISAS", request.param)
    return str(request.param)


pytestmark = pytest.mark.skipif(not HERE, reason="nothing here compiles native code that runs here")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_as_the_interpreter(name: str, dtype: str, isa: str) -> None:
    for tokens in (1, 7, 70):
        for got, wanted in zip(*run(name, dtype, isa, tokens, threads=2), strict=True):
            compare(got, wanted, dtype)


@pytest.mark.parametrize("tokens", [1, 5, 150])
def test_any_number_of_threads_makes_the_same_bits(isa: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = run("plain", "bf16", isa, tokens, threads=1)[0]
    for threads in (2, 3, 7):
        for got, wanted in zip(run("plain", "bf16", isa, tokens, threads)[0], alone, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("name", "dtype"), [("plain", "bf16"), ("input_and_tail", "f32")])
def test_no_access_out_of_bounds_and_no_undefined_behaviour(name: str, dtype: str, isa: str, threads: int) -> None:
    for tokens in (1, 6, 40):
        sanitized(name, dtype, isa, tokens, threads, sanitize.MEMORY)


def test_no_races(isa: str) -> None:
    for tokens in (1, 40):
        sanitized("plain", "bf16", isa, tokens, 3, sanitize.RACES)
