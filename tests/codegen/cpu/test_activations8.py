"""Quantised banks by int8 activations: native kernels against the op's reference, under sanitizers, by the ways in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsec
from sparsec.diagnostics import CompileError, SparsecError
from sparsec.dialects.moe import Experts, Layer
from sparsec.dialects.moe.references import rounded_to_int8
from sparsec.ir.interp import DerivedWeights, evaluate_func
from sparsec.ir.parser import parse_module
from sparsec.pipeline import run
from sparsec.runtime.executor import Program
from tests.codegen.cpu import experts
from tests.ways_in import modules
from tests.ways_in.test_weights import FACTORY, command

WEIGHTS = ("int8", "int4")
ISAS = pytest.mark.parametrize("isa", experts.HERE)
LAYERS: dict[str, dict[str, Any]] = {
    "odd": {"hidden": 100, "width": 52, "up_bias": True, "down_bias": True},
    "parts of groups": {"hidden": 192, "width": 200, "parts": 1, "early": True},
    "f32": {"dtype": "f32", "hidden": 72, "width": 161, "router": True, "tail": True},
    "wide": {"hidden": 64, "width": 5000, "experts": 2, "k": 1},
}


def layer(name: str, weights: str) -> experts.Experts:
    sizes: dict[str, Any] = {"dtype": "bf16", "experts": 5, "k": 2, **LAYERS[name]}
    return experts.Experts(weights=weights, activations="int8", **sizes)


def reference(layer: experts.Experts, values: Mapping[str, Tensor]) -> Tensor:
    """y as the op on packed banks defines it."""
    module = run(parse_module(layer.text()), target="cpu", to="schedule").module
    assert [op.activations for op in module.main.body.ops if isinstance(op, Experts | Layer)] == ["int8"]
    made, inputs = DerivedWeights(module, values), iter([values[name] for name in layer.inputs])
    of = [module.main.arg_attrs.get(arg, {}) for arg in module.main.body.args]
    args = [made[str(attrs["source"])] if "source" in attrs else next(inputs) for attrs in of]
    return evaluate_func(module, module.main, args)[0]


def agree(got: Tensor, wanted: Tensor) -> None:
    """f32 as far as int8 values that fall on the other side of a half allow; in bf16 h is rounded otherwise first."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    most = 2e-2 if got.dtype == torch.bfloat16 else 2e-3
    assert bool(((got - wanted).float().norm(dim=1) <= most * wanted.float().norm(dim=1)).all())


@ISAS
@pytest.mark.parametrize(
    ("name", "weights"),
    [("odd", "int8"), ("odd", "int4"), ("parts of groups", "int4"), ("f32", "int8"), ("wide", "int8")],
)
def test_kernels_compute_what_the_op_says(name: str, weights: str, isa: str) -> None:
    of = layer(name, weights)
    native = experts.Native(of, isa, of.drawn(1))
    for tokens in (0, 1, 17, 300):
        values = {**of.drawn(1), **{key: of.drawn(tokens)[key] for key in of.inputs}}
        agree(native(values)[0], reference(of, values))


@ISAS
@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_of_zeros_and_rows_that_are_not_finite(weights: str, isa: str) -> None:
    of = layer("odd", weights)
    values = of.drawn(40)
    x = values["x"]
    x[3], x[5, 7], x[6, 99], x[8] = 0.0, torch.nan, -torch.inf, x[8] * 1e-38
    found, wanted = experts.Native(of, isa, values)(values)[0], reference(of, values)
    assert found.isnan().all(1).nonzero().flatten().tolist() == [5, 6]
    assert wanted.isnan().all(1).nonzero().flatten().tolist() == [5, 6]
    rest = [i for i in range(40) if i not in (5, 6)]
    agree(found[rest], wanted[rest])


@pytest.mark.parametrize(("name", "weights"), [("parts of groups", "int4"), ("f32", "int8")])
def test_every_instruction_set_gives_the_same(name: str, weights: str) -> None:
    """int32 sums are exact, and scales are multiplied in one order."""
    of = layer(name, weights)
    values = of.drawn(70)
    found = [experts.Native(of, isa, values)(values)[0] for isa in experts.HERE]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-2, atol=1e-3)


def test_any_number_of_threads_gives_the_same() -> None:
    of, before = layer("parts of groups", "int4"), torch.get_num_threads()
    values = of.drawn(90)
    native, found = experts.Native(of, experts.HERE[0], values), list[Tensor]()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native(values)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@ISAS
@pytest.mark.parametrize(("name", "weights", "threads"), [("odd", "int4", 1), ("f32", "int8", 3)])
def test_sanitizers(name: str, weights: str, threads: int, isa: str) -> None:
    of = layer(name, weights)
    values = of.drawn(37)
    agree(experts.sanitized(of, isa, values, threads)[0], reference(of, values))


def test_rounding() -> None:
    rows = torch.tensor([[1.0, -2.54, 0.011, 0.0], [0.0, 0.0, 5.0, torch.inf], [1e-39, 0.0, 127.0, 63.4]])
    found = rounded_to_int8(rows, 2)
    step = 2.54 / 127
    torch.testing.assert_close(found[0], torch.tensor([50 * step, -2.54, 0.011, 0.0]))
    assert found[1, :2].tolist() == [0.0, 0.0] and found[1, 2:].isnan().all()
    assert found[2].tolist() == [0.0, 0.0, 127.0, 63.0]
    assert rounded_to_int8(rows[:, :3], 2).shape == (3, 3)


def test_the_error_includes_activations() -> None:
    model, x = modules.stack(hidden=256, width=256), torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    given = {name: sparsec.compile(model, (x,), weights="int8", activations=name) for name in ("model", "int8")}
    kept, narrow = ([layer.error for layer in made.weight_errors()] for made in given.values())
    assert all(1.2 * first < second < 0.025 for first, second in zip(kept, narrow, strict=True))
    assert {layer.activations for layer in given["int8"].weight_errors()} == {"int8"}
    wanted = model(x).detach()
    errors = [float((made(x) - wanted).norm() / wanted.norm()) for made in given.values()]
    assert 1e-5 < errors[0] < errors[1] < 0.025


def test_artifacts_and_torch_compile(tmp_path: Path) -> None:
    model, x = modules.stack(hidden=128, width=128), torch.randn(9, 128, generator=torch.Generator().manual_seed(1))
    compiled = sparsec.compile(model, (x,), weights="int4", activations="int8")
    assert 'activations = "int8"' in str(compiled.ir("schedule"))
    assert torch.equal(sparsec.load(compiled.save(tmp_path / "made"))(x), compiled(x))
    torch._dynamo.reset()
    options: dict[str, Any] = {"dense": "aten", "weights": "int4", "activations": "int8"}
    made: Any = torch.compile(model, backend="sparsec", options=options)
    with torch.no_grad():
        assert torch.equal(made(x), compiled(x))


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(FACTORY)
    factory, place = f"{tmp_path / 'model.py'}:make", tmp_path / "made.sparsec"
    flags = ("--weights", "int8", "--activations", "int8")
    assert command(monkeypatch, "compile", factory, "-o", place, *flags) == 0
    assert "int8 x int8" in capfd.readouterr().out
    text = tmp_path / "text.sparsec"
    assert command(monkeypatch, "compile", factory, "-o", text, "--to", "place") == 0
    assert "activations" not in text.read_text()
    again = tmp_path / "again.sparsec"
    assert command(monkeypatch, "compile", text, "-o", again, *flags, "--weights", place) == 0
    assert 'activations = "int8"' in (again / "module.sparsec").read_text()


def test_what_there_is_not() -> None:
    model, x = modules.stack(), torch.randn(3, 16)
    with pytest.raises(CompileError, match="int8 activations go with int8 or int4 weights"):
        sparsec.compile(model, (x,), activations="int8")
    with pytest.raises(SparsecError, match="activations are model, int8, fp8, not 'int4'"):
        sparsec.compile(model, (x,), weights="int8", activations="int4")


def test_without_native_code_activations_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    of = layer("odd", "int8")
    values, lowered = of.drawn(20), experts.lowered(of)
    made = experts.emitted(of, "amx" if experts.HERE[0] == "amx" else "avx512")
    monkeypatch.setenv("SPARSEC_ISAS", "avx2")
    with caplog.at_level(logging.WARNING, "sparsec"):
        program = Program(made.plan, DerivedWeights(lowered, values), files=made.files)
    assert "activations are not rounded to int8 there" in caplog.text
    (got,) = program(*(values[name] for name in of.inputs))
    exact = replace(of, activations="model").plain(of.stored(values), torch.float64)
    assert float((got.double() - exact).norm() / exact.norm()) < 0.006
