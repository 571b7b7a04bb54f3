"""Planted bugs, in passes and in a kernel: each is found from the outside, with the op and the user's line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from sparsec import pipeline
from sparsec.diagnostics import CompileError
from sparsec.frontend.capture import Captured, capture
from sparsec.inspect import kernel_errors
from sparsec.inspect.bisect import Report, bisect, widened
from sparsec.inspect.culprit import describe
from sparsec.ir.core import Module, Op
from sparsec.ir.printer import print_module
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.ir.types import TensorType
from sparsec.passes import base
from sparsec.passes.base import Pass, PassContext
from sparsec.runtime import backends


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.gate = nn.Linear(32, 8, bias=False)
        self.up = nn.Parameter(torch.randn(8, 96, 32) / 6)
        self.down = nn.Parameter(torch.randn(8, 32, 48) / 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights, ids = self.gate(h).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        rows = h.new_zeros(h.shape)
        for e in range(8):
            gate, up = torch.nn.functional.linear(h, self.up[e]).chunk(2, -1)
            y = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, self.down[e])
            rows = rows + y * ((ids == e) * weights).sum(-1, keepdim=True)
        return x + rows * 0.5


@pytest.fixture(scope="module")
def captured() -> Captured:
    torch.manual_seed(0)
    return capture(Layer(), (torch.randn(5, 32),))


def search(captured: Captured, **options: Any) -> Report:
    inputs = [[torch.randn(count, 32)] for count in (5, 9)]
    return bisect(captured.module, captured.weights, inputs, **options)


@pytest.fixture(autouse=True)
def _no_native_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling C++ would take most of the time."""
    monkeypatch.setenv("SPARSEC_CXX", "/nonexistent")


def plant(monkeypatch: pytest.MonkeyPatch, phase: str, change: Callable[[Op, Rewriter], bool], *roots: str) -> None:
    """Put a wrong pass behind a phase's own."""

    @dataclass(frozen=True)
    class Planted(Pass):
        """A bug."""

        name: ClassVar[str] = "planted"

        def run(self, module: Module, ctx: PassContext) -> None:
            ctx.rewrite(module, [rule(*roots)(change)])

    monkeypatch.setitem(base.PASSES, "planted", Planted)
    monkeypatch.setitem(pipeline.PIPELINES, phase, f"{pipeline.PIPELINES[phase]},planted")


def test_nothing_is_wrong(captured: Captured) -> None:
    report = search(captured)
    assert report.culprit is None and not report.skipped
    assert {"raise-route", "fuse-layer", "lower-kernels"} <= {step.name for step in report.steps}
    assert report.kernels and all(error < 1e-5 for error in report.kernels.values())


def test_a_replaced_op(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """x + y became x - y: the op that the pass made, by its rule, and the user's line."""

    def add_is_sub(op: Op, rw: Rewriter) -> bool:
        if op.loc.source.strip() != "return x + rows * 0.5":
            return False
        rw.replace(op, rw.make(op, "aten.sub.Tensor", op.operands, [op.result.type]).results)
        return True

    plant(monkeypatch, "fuse", add_is_sub, "aten.add.Tensor")
    culprit = search(captured).culprit
    assert culprit is not None and (culprit.kind, culprit.name, culprit.phase) == ("pass", "planted", "fuse")
    assert any("aten.sub.Tensor" in piece.text and "add_is_sub" in piece.by for piece in culprit.made)
    assert culprit.error > 0.1


def test_a_changed_attribute(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm's epsilon grew."""

    def large_epsilon(op: Op, rw: Rewriter) -> bool:
        if op.attrs.get("eps") == 1.0:
            return False
        op.attrs["eps"] = 1.0
        return True

    plant(monkeypatch, "raise", large_epsilon, "aten.layer_norm")
    culprit = search(captured).culprit
    assert culprit is not None and culprit.name == "planted" and "aten.layer_norm" in culprit.op
    assert culprit.loc.file.endswith("test_bisect.py") and "self.norm(x)" in culprit.loc.source


def test_a_wrong_region(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The activation of the fused layer lost its gate's sigmoid."""

    def relu_for_silu(op: Op, rw: Rewriter) -> bool:
        for inner in op.walk():
            if inner.name == "aten.silu":
                rw.replace(inner, rw.make(inner, "aten.relu", inner.operands, [inner.result.type]).results)
                return True
        return False

    plant(monkeypatch, "fuse", relu_for_silu, "moe.layer")
    culprit = search(captured).culprit
    assert culprit is not None and culprit.name == "planted"
    assert "moe.layer" in culprit.op and "aten.relu" in culprit.op


def test_a_wrong_operand(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts read the rows in front of the norm."""

    def skips_the_norm(op: Op, rw: Rewriter) -> bool:
        norm = op.operands[0].op
        if norm is None or norm.name != "aten.layer_norm":
            return False
        op.operands = (norm.operands[0], *op.operands[1:])
        return True

    plant(monkeypatch, "raise", skips_the_norm, "moe.experts")
    culprit = search(captured).culprit
    assert culprit is not None and culprit.name == "planted" and "moe.experts" in culprit.op


def test_a_wrong_kernel(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = backends._MAKERS["moe.layer"]

    def scaled(*args: Any) -> Any:
        call = maker(*args)
        return lambda ins: [out * 1.01 if out.is_floating_point() else out for out in call(ins)]

    monkeypatch.setitem(backends._MAKERS, "moe.layer", scaled)
    report = search(captured)
    assert report.culprit is not None and report.culprit.kind == "kernel"
    assert report.culprit.name.startswith("layer") and "moe.layer" in report.culprit.op
    assert report.culprit.error == pytest.approx(0.01, rel=0.2)
    assert all(step.error < 1e-5 for step in report.steps)


def test_a_pass_whose_module_cannot_run(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are named that the tensor does not have: the verifier cannot see it, running does."""

    def out_of_range(op: Op, rw: Rewriter) -> bool:
        if op.attrs.get("normalized_shape") == (31,):
            return False
        op.attrs["normalized_shape"] = (31,)
        return True

    plant(monkeypatch, "raise", out_of_range, "aten.layer_norm")
    culprit = search(captured).culprit
    assert culprit is not None and culprit.name == "planted" and "aten.layer_norm" in culprit.op


def test_low_precision_is_searched_in_f32() -> None:
    torch.manual_seed(1)
    model = Layer().bfloat16()
    made = capture(model, (torch.randn(5, 32).bfloat16(),))
    assert "bf16" not in str(widened(made.module).main.body.args[0].type)
    report = bisect(made.module, made.weights, [[torch.randn(count, 32).bfloat16()] for count in (5, 9)])
    assert report.culprit is None
    assert all(step.error < 1e-5 for step in report.steps)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are run on the GPU")
def test_gpu_kernels_are_interpreted_without_one(captured: Captured) -> None:
    pytest.importorskip("triton")
    report = search(captured, target="cuda:sm_90")
    assert report.culprit is None and "no GPU" in report.skipped
    assert any(step.name == "fuse-experts" for step in report.steps)
    assert set(report.kernels) == {"route_group_0", "gather_gemm_0", "gemm_combine_0"}
    assert all(error < 1e-5 for error in report.kernels.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are run on the GPU")
def test_a_wrong_gpu_kernel(captured: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are generated from another activation than the one that their op says."""
    pytest.importorskip("triton")

    def relu_for_silu(module: Module) -> str:
        return print_module(module).replace("aten.silu", "aten.relu")

    monkeypatch.setattr(kernel_errors, "print_module", relu_for_silu)
    culprit = search(captured, target="cuda:sm_90").culprit
    assert culprit is not None and (culprit.kind, culprit.name) == ("kernel", "gather_gemm_0")
    assert "%h is wrong in" in describe(culprit) and culprit.loc.file.endswith("test_bisect.py")


class Tied(nn.Module):
    """One of four experts by scores that are equal in pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 2, bias=False)
        self.up = nn.Parameter(torch.randn(4, 24, 16) / 4)
        self.down = nn.Parameter(torch.randn(4, 16, 24) / 5)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).repeat(1, 2).softmax(-1).topk(1)
        rows = torch.zeros_like(x)
        for e in range(4):
            y = torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(x, self.up[e])), self.down[e])
            rows = rows + y * ((ids == e) * weights).sum(-1, keepdim=True)
        return rows


@pytest.mark.parametrize(("turned", "wrong"), [((2, 3, 0, 1), False), ((1, 0, 3, 2), True)])
def test_a_tie_that_falls_the_other_way_is_no_error(
    turned: tuple[int, ...], wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores among which experts of equal score change places choose as well as before; others do not."""
    torch.manual_seed(3)
    captured = capture(Tied(), (torch.randn(5, 16),))

    def permute(op: Op, rw: Rewriter) -> bool:
        (scores,), type = op.operands, op.operands[0].tensor
        if scores.op is None or scores.op.name == "aten.cat":
            return False
        one = TensorType((type.shape[0], 1), type.dtype)
        columns = [
            rw.make(op, "aten.slice.Tensor", [scores], [one], {"dim": 1, "start": at, "end": at + 1}).result
            for at in turned
        ]
        op.operands = (rw.make(op, "aten.cat", [tuple(columns)], [type], {"dim": 1}).result,)
        return True

    plant(monkeypatch, "raise", permute, "aten.topk")
    culprit = bisect(captured.module, captured.weights, [[torch.randn(count, 16)] for count in (5, 9)]).culprit
    assert (culprit is not None) == wrong


def test_a_model_that_gives_nan_is_refused(captured: Captured) -> None:
    weights = {name: value * float("nan") for name, value in captured.weights.items()}
    with pytest.raises(CompileError, match="itself gives NaN"):
        bisect(captured.module, weights, [[torch.randn(5, 32)]])


def test_numbers_of_tokens_that_the_model_does_not_take_are_left_out(captured: Captured) -> None:
    narrow = [torch.randn(4, 31)]
    report = bisect(captured.module, captured.weights, [narrow, [torch.randn(5, 32)]])
    assert report.culprit is None and report.kernels
    with pytest.raises(CompileError, match="size of 31"):
        bisect(captured.module, captured.weights, [narrow])
