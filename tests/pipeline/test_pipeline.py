"""Phases, the pass manager, reproducers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from sparsec import pipeline
from sparsec.diagnostics import CompileError, SparsecError
from sparsec.ir.core import Module
from sparsec.ir.equal import equal
from sparsec.ir.interp import evaluate_module
from sparsec.ir.opdef import make
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module
from sparsec.passes import PASSES
from sparsec.passes.base import Pass, PassContext, register

LAYER = """
module {phase = "capture", version = 1}

func @main(%x: tensor<s0x16xf32> {kind = "input"}, %gate: tensor<8x16xf32> {kind = "param", source = "gate"}, %up: tensor<8x24x16xf32> {kind = "param", source = "up"}, %down: tensor<8x16x12xf32> {kind = "param", source = "down"}) -> (tensor<s0x16xf32> {kind = "output"}) {
  loc "m.py":1 in "mlp"
  %z = aten.linear(%x, %gate) : tensor<s0x8xf32>
  loc "m.py":2 in "mlp"
  %p = aten.softmax.int(%z) {dim = 1} : tensor<s0x8xf32>
  loc "m.py":3 in "mlp"
  %w, %i = aten.topk(%p) {k = 2} : tensor<s0x2xf32>, tensor<s0x2xi64>
  loc "m.py":9 in "mlp"
  %y = moe.experts(%x, %i, %w, %up, %down) : tensor<s0x16xf32> {
    activation(%a: tensor<rx12xf32>, %b: tensor<rx12xf32>):
      %h = aten.mul.Tensor(%a, %b) : tensor<rx12xf32>
      yield %h
  }
  return %y
}
"""  # noqa: E501


def layer() -> Module:
    return parse_module(LAYER)


def results(module: Module, tokens: int) -> torch.Tensor:
    torch.manual_seed(0)
    weights = {
        name: torch.randn(shape) for name, shape in [("gate", (8, 16)), ("up", (8, 24, 16)), ("down", (8, 16, 12))]
    }
    (y,) = evaluate_module(module, [torch.randn(tokens, 16)], weights)
    return y


@pytest.mark.parametrize("target", ["cpu", "cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942", "hip:gfx950"])
def test_every_phase_gives_the_same_bits(target: str) -> None:
    result = pipeline.run(layer(), target=target)
    assert tuple(result.phases) == pipeline.PHASES
    for tokens in (1, 6):
        wanted = results(layer(), tokens)
        for phase in pipeline.PHASES:
            assert torch.equal(results(result.ir(phase), tokens), wanted), phase
    backends = {str(func.attrs["backend"]) for func in result.module.funcs.values() if "backend" in func.attrs}
    assert backends == ({"cpp"} if target == "cpu" else {"triton"})


GPU_KERNELS = ["route_group", "gather_gemm", "gemm_combine"]


@pytest.mark.parametrize(("target", "kernels"), [("cpu", ["layer"]), ("cuda:sm_90", GPU_KERNELS)])
def test_what_holds_after_each_phase(target: str, kernels: list[str]) -> None:
    result = pipeline.run(layer(), target=target)

    def ops(phase: str) -> list[str]:
        return [op.name for op in result.ir(phase).main.body.ops]

    assert ops("raise") == ops("place") == ["aten.linear", "moe.route", "moe.experts", "func.return"]
    fused = ["aten.linear", *(f"moe.{kernel}" for kernel in kernels), "func.return"]
    assert ops("fuse") == ops("schedule") == fused
    assert {op.partition(".")[0] for op in ops("lower")} == {"aten", "kernel", "func"}
    made = [name for name, func in result.module.funcs.items() if "backend" in func.attrs]
    assert made == [f"{kernel}_0" for kernel in kernels]
    assert result.module.attrs == {"phase": "lower", "version": 1, "target": target}


def test_a_fused_op_keeps_the_lines_of_its_origins() -> None:
    module = pipeline.run(layer(), target="cuda:sm_90", to="fuse").module
    route = next(op for op in module.walk() if op.name == "moe.route_group")
    assert [route.loc.line, *(origin.line for origin in route.loc.origins)] == [2, 3]
    assert [op.loc.line for op in route.regions[0].ops] == [2, 3, 3]
    module = pipeline.run(layer(), target="cpu", to="fuse").module
    (whole,) = (op for op in module.walk() if op.name == "moe.layer")
    assert sorted(origin.line for origin in (whole.loc, *whole.loc.origins)) == [2, 3, 9]


@pytest.mark.parametrize("stop", ["capture", "raise", "place", "fuse", "schedule"])
def test_going_on_from_text_is_the_same_as_going_through(stop: str) -> None:
    through = pipeline.run(layer(), target="cuda:sm_90").module
    half = pipeline.run(layer(), target="cuda:sm_90", to=stop)
    resumed = pipeline.run(parse_module(half.text(stop)), target="cuda:sm_90")
    assert equal(resumed.module, through)
    assert tuple(resumed.phases) == pipeline.PHASES[pipeline.PHASES.index(stop) :]


def test_what_cannot_be_run_is_said() -> None:
    with pytest.raises(CompileError, match="there is no phase 'fuze'"):
        pipeline.run(layer(), target="cpu", to="fuze")
    done = pipeline.run(layer(), target="cpu", to="fuse").module
    with pytest.raises(CompileError, match="the module is past phase 'raise': it went through 'fuse'"):
        pipeline.run(done, target="cpu", to="raise")
    with pytest.raises(CompileError, match="was fused for cpu, not for cuda:sm_90"):
        pipeline.run(done, target="cuda:sm_90")
    with pytest.raises(CompileError, match=r"there is no target 'cuda:sm_35' \(there are: cpu, cuda:sm_80"):
        pipeline.run(layer(), target="cuda:sm_35")
    with pytest.raises(SparsecError, match=r"phase 'lower' did not run \(there are: capture, raise\)"):
        pipeline.run(layer(), target="cpu", to="raise").ir("lower")


def test_records_tell_time_counts_and_remarks() -> None:
    result = pipeline.run(layer(), target="cpu", to="raise")
    record = next(record for record in result.records if record.name == "raise-route")
    assert record.phase == "raise" and record.changed and record.ms > 0
    assert (record.ops_before, record.ops_after) == (7, 11)
    ((rule, count),) = record.counts.items()
    assert rule.startswith("raise_route (passes/raise_route.py:") and count == 1
    (remark,) = [remark for remark in result.remarks if remark.pass_name == "raise-route"]
    assert (remark.kind, remark.loc.line, remark.rule) == ("passed", 9, rule)


class Watch(pipeline.Instrument):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def start(self, module: Module, passes: Sequence[tuple[str, Pass]]) -> None:
        self.seen.append(f"start {len(passes)}")

    def before(self, phase: str, pass_: Pass, module: Module) -> None:
        self.seen.append(f"before {pass_}")

    def after(self, record: pipeline.PassRecord, module: Module) -> None:
        self.seen.append(f"after {record.name}")

    def phase_done(self, phase: str, module: Module) -> None:
        self.seen.append(f"done {phase}")

    def finish(self, result: pipeline.Result) -> None:
        self.seen.append("finish")


def test_instruments_are_told_in_order() -> None:
    watch = Watch()
    half = pipeline.run(layer(), target="cpu", to="fuse").module
    pipeline.run(half, target="cpu", to="schedule", instruments=[watch])
    passes = [pass_.name for pass_ in pipeline.phase_passes("schedule")]
    ran = [f"{when} {name}" for name in passes for when in ("before", "after")]
    assert watch.seen == [f"start {len(passes)}", *ran, "done schedule", "finish"]


@dataclass(frozen=True)
class Break(Pass):
    """Make the module wrong, or raise: a pass for tests."""

    name: ClassVar[str] = "test-break"
    how: str = "raise"  #: `raise`, or `type` for a wrong type

    def run(self, module: Module, ctx: PassContext) -> None:
        if self.how == "raise":
            raise KeyError("lost")
        ops = module.main.body.ops
        wrong = make("moe.group", [ops[2].results[1]], [ops[2].results[0].type] * 2, {"num_experts": 8}, loc=ops[2].loc)
        ops.insert(3, wrong)
        wrong.block = module.main.body
        ctx.changed("wrong ops")


@pytest.fixture
def broken() -> object:
    register(Break)
    yield None
    del PASSES[Break.name]


@pytest.mark.parametrize("how", ["raise", "type"])
def test_a_failing_pass_leaves_a_reproducer_that_fails_alike(broken: object, how: str) -> None:
    def fail(module: Module, passes: str) -> tuple[CompileError, Path]:
        with pytest.raises(CompileError) as caught:
            pipeline.run_passes(module, passes)
        path = Path(str(caught.value).rpartition("sparsec opt ")[2].split()[0])
        return caught.value, path

    error, path = fail(layer(), f"cse,test-break{{how={how}}},dce")
    wanted = "pass 'test-break' failed: KeyError" if how == "raise" else "result 'order' is"
    assert wanted in str(error)
    text = path.read_text()
    path.unlink()
    found = pipeline.reproducer_header(text)
    assert found == ("cse,test-break" if how == "raise" else "cse,test-break{how=type}", "cpu")
    again = parse_module(text)
    assert equal(again, layer())
    assert found is not None
    error, path = fail(again, found[0])
    path.unlink()
    assert wanted in str(error)


def test_the_verifier_names_the_pass(broken: object) -> None:
    with pytest.raises(CompileError, match=r"m\.py:3: error:[\s\S]*found after pass 'test-break\{how=type\}'"):
        pipeline.run_passes(layer(), "test-break{how=type}")


def test_an_ordinary_text_has_no_reproducer_header() -> None:
    assert pipeline.reproducer_header(print_module(layer())) is None
