"""The rewriter: fixed points, locations, provenance, order of insertions, speed."""

from __future__ import annotations

import time

import pytest

from sparsec.ir.core import Block, Func, Module, Op
from sparsec.ir.loc import Loc
from sparsec.ir.opdef import make
from sparsec.ir.rewrite import Rewriter, rewrite, rule
from sparsec.ir.types import DType, TensorType

F32 = TensorType((4,), DType.f32)


def chain(names: list[str]) -> Module:
    """main(x) = names[-1](... names[0](x)), the op i at line i + 1 of m.py."""
    body = Block([F32], ["x"])
    value = body.args[0]
    for i, name in enumerate(names):
        value = body.append(make(f"aten.{name}", [value], [F32], loc=Loc("m.py", i + 1))).results[0]
    body.append(make("func.return", [value]))
    return Module([Func("main", body)])


def names(module: Module) -> list[str]:
    return [op.name.removeprefix("aten.") for op in module.main.body.ops[:-1]]


@rule("aten.exp")
def exp_log(op: Op, rw: Rewriter) -> bool:
    """exp(log(x)) -> abs(neg(x))"""
    inner = op.operands[0].op
    if inner is None or inner.name != "aten.log":
        return False
    first = rw.make(op, "aten.neg", inner.operands, [F32])
    rw.replace_op(op, "aten.abs", [first.results[0]])
    rw.erase(inner)
    return True


def test_new_ops_carry_the_locations_of_all_that_they_replace() -> None:
    module = chain(["log", "exp", "cos"])
    rw = rewrite(module, [exp_log])
    assert names(module) == ["neg", "abs", "cos"]
    for op in module.main.body.ops[:2]:
        assert (op.loc.line, [origin.line for origin in op.loc.origins]) == (2, [1])
    assert rw.counts[exp_log] == 1


def test_provenance_names_the_rule_its_line_and_what_it_replaced() -> None:
    module = chain(["log", "exp"])
    rw = rewrite(module, [exp_log])
    made = rw.made[module.main.body.ops[0]]
    assert made == f"{exp_log.place} (exp_log) from aten.exp, aten.log"
    path, line = exp_log.place.split(":")
    assert path.endswith("test_rewrite.py")
    with open(__file__) as file:
        assert file.read().splitlines()[int(line) - 1].startswith("@rule")


def test_rules_apply_until_nothing_changes() -> None:
    @rule("aten.exp")
    def drop(op: Op, rw: Rewriter) -> bool:
        rw.replace(op, op.operands)
        return True

    module = chain(["exp", "log", "exp", "exp"])
    assert rewrite(module, [drop]).counts[drop] == 3
    assert names(module) == ["log"]


def test_rules_that_undo_each_other_are_an_error() -> None:
    @rule("aten.exp", "aten.log")
    def flip(op: Op, rw: Rewriter) -> bool:
        rw.replace_op(op, "aten.log" if op.name == "aten.exp" else "aten.exp", op.operands)
        return True

    with pytest.raises(RuntimeError, match=r"does not end: flip \("):
        rewrite(chain(["exp"]), [flip])


def test_insert_after_an_argument_and_after_an_op() -> None:
    @rule("aten.exp")
    def surround(op: Op, rw: Rewriter) -> bool:
        value, block = op.operands[0], op.block
        if value.op is not None or block is None:
            return False
        op.operands = rw.insert_after(make("aten.neg", [value], [F32]), value).results
        block.ops[-1].operands = rw.insert_after(make("aten.abs", op.results, [F32]), op.results[0]).results
        return True

    module = chain(["exp"])
    rewrite(module, [surround])
    assert names(module) == ["neg", "exp", "abs"]


def test_erasing_a_value_in_use_is_an_error() -> None:
    @rule("aten.exp")
    def wrong(op: Op, rw: Rewriter) -> bool:
        rw.erase(op)
        return True

    with pytest.raises(ValueError, match=r"'aten\.exp' \(m\.py:1\) is erased while its results are used"):
        rewrite(chain(["exp", "log"]), [wrong])


def test_a_sweep_is_linear_in_the_ops() -> None:
    def best_of_three(pairs: int) -> float:
        times = list[float]()
        for _ in range(3):
            module = chain(["log", "exp"] * pairs)
            began = time.perf_counter()
            rewrite(module, [exp_log])
            times.append(time.perf_counter() - began)
            assert len(names(module)) == 2 * pairs
        return min(times)

    small, large = best_of_three(500), best_of_three(4000)
    assert large < 30 * small, f"8 times the ops take {large / small:.0f} times as long"
