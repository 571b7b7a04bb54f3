"""Crash reproducers made smaller: the failure stays, nearly everything else goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from click.testing import CliRunner

from benchmarks.ir import model_text
from sparsec import pipeline
from sparsec.cli import cli
from sparsec.diagnostics import CompileError, SparsecError
from sparsec.inspect.reduce import reduce
from sparsec.ir.core import Module, Op
from sparsec.ir.equal import count_ops
from sparsec.ir.parser import parse_module
from sparsec.passes import base
from sparsec.passes.base import Pass, PassContext


def plant(monkeypatch: pytest.MonkeyPatch, change: Callable[[Op], None]) -> None:
    """Make a pass `planted` that does something to every op."""

    @dataclass(frozen=True)
    class Planted(Pass):
        """A bug."""

        name: ClassVar[str] = "planted"

        def run(self, module: Module, ctx: PassContext) -> None:
            for op in module.walk():
                change(op)
            ctx.changed("planted")

    monkeypatch.setitem(base.PASSES, "planted", Planted)


def layers(count: int) -> Module:
    return parse_module(model_text(15 * count))


def names(module: Module) -> list[str]:
    return [op.name for op in module.main.body.ops]


def test_one_op_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(op: Op) -> None:
        if op.name == "aten.rsqrt" and op.loc.scope == "model.layers.3.norm":
            raise ValueError(f"no root at {op.loc.line}")

    plant(monkeypatch, crash)
    module = layers(6)
    left = reduce(module, "canonicalize,cse,planted", "cpu")
    assert names(left.module) == ["aten.rsqrt", "func.return"] and left.ops == 2
    assert left.ops_before == count_ops(module) > 80
    assert [pass_.name for pass_ in left.passes] == ["planted"]
    assert len(left.module.main.body.args) == 1
    assert left.message == "pass 'planted' failed: ValueError: no root at 21"
    with pytest.raises(CompileError, match="no root at 21"):
        pipeline.run_passes(parse_module(left.text), "planted")


def test_two_ops_that_belong_together_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(op: Op) -> None:
        first = op.operands[0].op if op.operands else None
        if op.name == "moe.experts" and first is not None and first.name == "aten.mul.Tensor":
            raise KeyError(op.name)

    plant(monkeypatch, crash)
    left = reduce(layers(3), "planted", "cpu")
    assert names(left.module) == ["aten.mul.Tensor", "moe.experts", "func.return"]


def test_a_region_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(op: Op) -> None:
        if op.name == "aten.silu":
            raise RuntimeError("silu")

    plant(monkeypatch, crash)
    left = reduce(layers(2), "planted", "cpu")
    (experts,) = [op for op in left.module.main.body.ops if op.regions]
    assert [op.name for op in experts.regions[0].ops] == ["aten.silu", "moe.yield"]


def test_what_the_verifier_finds_after_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of values and numbers in the message may change; another message may not."""

    def wrong(op: Op) -> None:
        if op.name == "moe.route":
            op.regions[0].terminator.operands = op.regions[0].terminator.operands[::-1]
        if op.name == "func.return" and any(value.op is None for value in op.operands):
            raise ValueError("another failure, which smaller modules have")

    plant(monkeypatch, wrong)
    left = reduce(layers(2), "planted", "cpu")
    assert "moe.route" in names(left.module) and left.ops < 8
    assert "another failure" not in left.message


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(op: Op) -> None:
        if op.name == "aten.rsqrt":
            raise ValueError

    plant(monkeypatch, crash)
    times = iter(range(100))
    left = reduce(layers(3), "planted", "cpu", seconds=5, clock=lambda: next(times))
    assert 0 < left.tries <= 6 and left.ops > 2


def test_what_does_not_fail_is_not_reduced() -> None:
    with pytest.raises(SparsecError, match="does not fail under --passes 'dce'"):
        reduce(layers(1), "dce", "cpu")


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def crash(op: Op) -> None:
        if op.name == "aten.linear":
            raise ValueError("linear")

    plant(monkeypatch, crash)
    source, small = tmp_path / "crash.sparsec", tmp_path / "small.sparsec"
    source.write_text(f"// x\n// pipeline: dce,planted\n// target: cpu\n\n{model_text(30)}")
    before = set(tmp_path.iterdir())
    done = CliRunner().invoke(cli, ["opt", str(source), "--reduce", "-o", str(small)])
    assert done.exit_code == 0, done.output
    assert "2 of 31 ops are left" in " ".join(done.stderr.split()) and "ValueError: linear" in done.stderr
    assert names(parse_module(small.read_text())) == ["aten.linear", "func.return"]
    assert set(tmp_path.iterdir()) == {*before, small}
    again = CliRunner().invoke(cli, ["opt", str(small)])
    assert isinstance(again.exception, CompileError) and "ValueError: linear" in str(again.exception)
