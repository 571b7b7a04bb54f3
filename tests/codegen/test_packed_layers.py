"""Layers with packed banks, from `fuse` to plans: who is asked to run them, and what runs in its stead."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sparsec import pipeline
from sparsec.codegen.cpu import compiler
from sparsec.codegen.emit import Emitted, emit
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Module
from sparsec.ir.interp import DerivedWeights, evaluate_module
from sparsec.launch import register
from sparsec.runtime import packing
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.executor import Program
from sparsec.runtime.live_banks import _seen
from sparsec.runtime.plan import Launch
from sparsec.runtime.plan_json import from_json, to_json
from tests.codegen.layers import LAYERS, inputs

torch.set_num_threads(1)
BANKS = ("up", "down", "ub", "db")
CASES = ["plain", "input", "tail", "input_and_tail", "capacity", "top_1"]


@pytest.fixture(autouse=True)
def pack_small_banks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The banks of these tests are smaller than what oneDNN packs otherwise."""
    monkeypatch.setattr(packing, "SMALLEST", {2: 1, 4: 1})


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A generator of C++ that knows one program, in the place of the real one."""
    fake = ModuleType("sparsec.codegen.cpu.emit")
    fake.emit_kernel = lambda func: "int nothing;"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    yield fake


def packed(name: str, weights: str, tokens: int = 7) -> tuple[Module, Module, dict[str, Tensor], list[Tensor]]:
    """A layer before and after `lower`, its weights, and other inputs."""
    module = LAYERS[name].module()
    drawn = dict(zip([arg.name for arg in module.main.body.args], inputs(module, tokens), strict=True))
    given = {key: value for key, value in drawn.items() if key in BANKS}
    for arg in module.main.body.args:
        if arg.name in BANKS:
            module.main.arg_attrs[arg] = {"kind": "param", "source": arg.name}
    fused = pipeline.run(module, target="cpu", to="fuse").ir("fuse")
    pipeline.run_passes(module, f"pack-banks{{weights={weights}}}")
    low = pipeline.run(module, target="cpu").module
    return fused, low, given, [value for key, value in drawn.items() if key not in BANKS]


def kernel_of(emitted: Emitted) -> str:
    return next(name for name, kernel in emitted.plan.kernels.items() if kernel.op in ("moe.layer", "moe.experts"))


@pytest.mark.parametrize("weights", ["model", "int8", "int4"])
@pytest.mark.parametrize("name", CASES)
def test_without_a_generator_the_tiles_are_unpacked_for_onednn(
    name: str, weights: str, generator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decline(func: object) -> str:
        raise CompileError("there is no C++ for 'aten.erfinv'", hint="none")

    monkeypatch.setattr(generator, "emit_kernel", decline)
    fused, low, given, rest = packed(name, weights)
    emitted = emit(low, "cpu")
    kernel = emitted.plan.kernels[kernel_of(emitted)]
    assert (kernel.backend, kernel.source, kernel.binaries) == ("onednn", None, {})
    assert kernel.attrs["packing"] == {"model": "tiles"}.get(weights, weights)
    (remark,) = emitted.remarks
    assert "is run by prepacked oneDNN linears: there is no C++ for 'aten.erfinv'" in remark.message
    program = Program(emitted.plan, DerivedWeights(low, given))
    wanted = evaluate_module(low, rest, given)
    for got, value in zip(program(*rest), wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)
    exact, most = evaluate_module(fused, rest, given)[0], {"model": 1e-5, "int8": 0.02, "int4": 0.3}[weights]
    assert (wanted[0] - exact).norm() <= most * exact.norm()


def test_banks_of_a_graph_are_kept_unpacked_once_seen_again(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "build_all", lambda source: {})
    _, low, given, rest = packed("tail", "int8")
    plan = emit(low, "cpu").plan
    weights, inputs_left = DerivedWeights(low, given), iter(rest)
    held = {arg.slot: next(inputs_left) if arg.kind == "input" else weights[arg.source] for arg in plan.args}
    (step,) = (step for step in plan.steps if isinstance(step, Launch))
    launched = register(plan.kernels[step.kernel], torch.device("cpu"), {})
    wanted = evaluate_module(low, rest, given)[0]
    before = len(_seen)
    for _ in range(3):
        got = torch.ops.sparsec.launch(launched, [None if slot is None else held[slot] for slot in step.ins])
        torch.testing.assert_close(got[0], wanted, rtol=1e-5, atol=1e-5)
    assert [entry.bank is not None for entry in _seen.values()][before:] == [True, True]


def test_a_kernel_has_its_source_and_a_library_for_each_instruction_set(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "build_all", lambda source: {"avx2": b"old", "amx": b"new"})
    emitted = emit(packed("plain", "model")[1], "cpu")
    kernel = emitted.plan.kernels["layer_0"]
    assert (kernel.backend, kernel.source) == ("cpp", "kernels/layer_0.cpp")
    assert kernel.binaries == {"avx2": "kernels/layer_0.avx2.so", "amx": "kernels/layer_0.amx.so"}
    assert emitted.files == {
        "kernels/layer_0.cpp": b"int nothing;",
        "kernels/layer_0.avx2.so": b"old",
        "kernels/layer_0.amx.so": b"new",
    }
    assert list(kernel.regions) == ["router", "activation"]
    assert not emitted.remarks
    assert from_json(json.loads(json.dumps(to_json(emitted.plan)))) == emitted.plan


def test_without_a_compiler_onednn_runs_and_it_is_said(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(source: str) -> dict[str, bytes]:
        raise compiler.NoCompiler("there is no C++ compiler here", hint="install g++")

    monkeypatch.setattr(compiler, "build_all", lack)
    _, low, given, rest = packed("plain", "model")
    emitted = emit(low, "cpu")
    assert emitted.plan.kernels["layer_0"].binaries == {}
    (remark,) = emitted.remarks
    assert "moe.layer is run by prepacked oneDNN linears: there is no C++ compiler here" in remark.message
    assert remark.suggestion == "install g++"
    program = Program(emitted.plan, DerivedWeights(low, given), files=emitted.files)
    torch.testing.assert_close(program(*rest)[0], evaluate_module(low, rest, given)[0], rtol=1e-5, atol=1e-5)


def test_tiles_of_another_shape_are_refused(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "build_all", lambda source: {})
    _, low, given, _ = packed("plain", "model")
    data = to_json(emit(low, "cpu").plan)
    data["kernels"]["layer_0"]["regions"]["activation"]["params"][0]["shape"][-1] = 4000
    with pytest.raises(ArtifactError, match="its bank 'up' cannot be unpacked"):
        Program(from_json(data), DerivedWeights(low, given))
