"""Plans that several ranks run: what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsec.runtime.check import check_plan
from sparsec.runtime.distributed import World
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.exchanges import Idle
from sparsec.runtime.executor import Program
from sparsec.runtime.plan import Arg, Call, Exchange, Free, Output, Plan, Spread, SpreadLayer, Step, Tensor
from sparsec.runtime.plan_json import from_json, to_json

RANKS, SLOTS, EXPERTS, WIDTH = 4, 2, 6, 4

X = Tensor(("s0", WIDTH), "f32")
IDS, WEIGHTS = Tensor(("s0", 2), "i64"), Tensor(("s0", 2), "f32")
ROWS = Tensor(("u0", WIDTH), "f32")
TABLE, SHARES = Tensor((RANKS * SLOTS,), "i64"), Tensor((RANKS * SLOTS,), "f64")


def start(**attrs: Any) -> dict[str, Any]:
    made = {"ranks": RANKS, "width": 2, "slots": SLOTS, "dedup": "rank", "algo": "flat", "payload": "model"}
    return made | attrs


def remap(**attrs: Any) -> dict[str, Any]:
    return {"experts": EXPERTS, "ranks": RANKS, "width": 2, "policy": "static"} | attrs


def spread_plan() -> Plan:
    """x, ids, weights -> rows are sent, doubled where they arrive, and combined."""
    inputs = [("x", X), ("ids", IDS), ("weights", WEIGHTS)]
    args = [Arg(name, i, "input", type) for i, (name, type) in enumerate(inputs)]
    args += [
        Arg("slots", 3, "buffer", TABLE, "placement/0/slots"),
        Arg("shares", 4, "buffer", SHARES, "placement/0/shares"),
    ]
    steps: list[Step] = [
        Exchange("remap", remap(), [1, 3, 4], [5], [IDS, TABLE, SHARES]),
        Exchange("dispatch_start", start(), [0, 5, 2], [6], [X, IDS, WEIGHTS]),
        Exchange("dispatch_wait", {}, [6], [7, 8, 9], [None], [(7, 0, "u0")]),
        Call("aten.mul.Scalar", [{"slot": 7}, 2], {}, [10]),
        Exchange("combine_start", {}, [10, 6], [11], [ROWS, None]),
        Free([6, 7, 10]),
        Exchange("combine_wait", {}, [11], [12], [None]),
    ]
    spread = Spread(RANKS, 2, SLOTS, [SpreadLayer("0", EXPERTS, "placement/0/slots", "placement/0/shares", [])])
    leaves: list[dict[str, Any]] = [{"kind": "leaf", "index": i} for i in range(3)]
    tree = {"args": {"kind": "tuple", "items": leaves}, "kwargs": {"kind": "dict", "keys": [], "items": []}}
    return Plan(args, steps, [Output("output", 12)], {}, tree, leaves[0], spread)


def with_step(number: int, **changes: Any) -> Plan:
    plan = spread_plan()
    plan.steps[number] = replace(plan.steps[number], **changes)
    return plan


def without(number: int) -> Plan:
    plan = spread_plan()
    del plan.steps[number]
    return plan


def without_wait() -> Plan:
    plan = with_step(3, args=[{"slot": 0}, 2])
    sent = plan.steps[4]
    assert isinstance(sent, Exchange)
    plan.steps[4] = replace(sent, types=[X, None])
    del plan.steps[2]
    return plan


def with_layer(**changes: Any) -> Plan:
    plan = spread_plan()
    assert plan.spread is not None
    return replace(plan, spread=replace(plan.spread, layers=[replace(plan.spread.layers[0], **changes)]))


def with_spread(**changes: Any) -> Plan:
    plan = spread_plan()
    assert plan.spread is not None
    return replace(plan, spread=replace(plan.spread, **changes))


def test_sound_plan_and_its_json() -> None:
    plan = spread_plan()
    check_plan(plan)
    again = from_json(json.loads(json.dumps(to_json(plan))))
    check_plan(again)
    assert again == plan


def test_one_process_is_told_what_to_do() -> None:
    with pytest.raises(ArtifactError, match=r"compiled for 4 devices.*torchrun --nproc-per-node 4"):
        Program(spread_plan(), {})


CASES: list[tuple[str, Callable[[], Plan]]] = [
    ("is no exchange", lambda: with_step(0, op="all_reduce")),
    ("policy = 'best'", lambda: with_step(0, attrs=remap(policy="best"))),
    ("experts = True", lambda: with_step(0, attrs=remap(experts=True))),
    ("tables that are not those of one layer", lambda: with_step(0, ins=[1, 4, 3], types=[IDS, TABLE, SHARES])),
    ("it takes", lambda: with_step(1, attrs={"ranks": RANKS})),
    ("has ranks = 8, the plan has 4", lambda: with_step(1, attrs=start(ranks=8))),
    ("has slots = 3, the plan has 2", lambda: with_step(1, attrs=start(slots=3))),
    ("goes with algo 'two_level'", lambda: with_step(1, attrs=start(dedup="node"))),
    ("must be model or bf16 or fp8", lambda: with_step(1, attrs=start(payload="pickle"))),
    ("is no tensor of f64 or f32", lambda: with_step(1, types=[IDS, IDS, WEIGHTS])),
    ("takes 3 values to 1", lambda: with_step(1, ins=[0, 5])),
    ("reads slot 40, which holds no value", lambda: with_step(1, ins=[40, 5, 2])),
    ("uses the symbol 's9'", lambda: with_step(1, types=[Tensor(("s9", 4), "f32"), IDS, WEIGHTS])),
    ("in the state 'dispatch started', slot 0 is: no handle", lambda: with_step(2, ins=[0])),
    ("writes slot 0, which is taken", lambda: with_step(2, outs=[0, 8, 9])),
    ("binds 'u0' to slot 3", lambda: with_step(2, binds=[(3, 0, "u0")])),
    ("reads slot 6, which holds no value", lambda: with_step(3, args=[{"slot": 6}, 2])),
    ("in the state 'dispatch done', slot 6 is: dispatch started", without_wait),
    ("drops slot 6, the handle of an exchange that is not over", lambda: without(4)),
    ("in the state 'combine started'", lambda: with_step(6, ins=[6])),
    ("names no source|no buffer", lambda: with_layer(slots="elsewhere")),
    ("no weight of 2 slots", lambda: with_layer(banks=["placement/0/slots"])),
    ("9 experts in 8 slots", lambda: with_layer(experts=9)),
    ("not nodes of 3", lambda: with_spread(width=3)),
    ("not spread over ranks", lambda: replace(spread_plan(), spread=None)),
    ("0 slots", lambda: with_spread(slots=0)),
]


@pytest.mark.parametrize(("message", "make"), CASES)
def test_refused(message: str, make: Callable[[], Plan]) -> None:
    with pytest.raises(ArtifactError, match=message):
        check_plan(make())


def test_unfinished_exchange_is_refused() -> None:
    plan = spread_plan()
    del plan.steps[5:]
    plan.outputs[0] = Output("output", 10)
    with pytest.raises(ArtifactError, match=r"ends with the exchange of slot 11 in the state 'combine started'"):
        check_plan(plan)


TABLES = {"placement/0/slots": [0, 1, 2, 3, 4, 5, 0, 1], "placement/0/shares": [0.5, 0.5, 1, 1, 1, 1, 0.5, 0.5]}


def loaded(plan: Plan | None = None, changes: dict[str, list[Any]] | None = None) -> Program:
    given = TABLES | {f"placement/0/{name}": table for name, table in (changes or {}).items()}
    dtypes = {"placement/0/slots": torch.int64, "placement/0/shares": torch.float64}
    weights = {source: torch.tensor(table, dtype=dtypes[source]) for source, table in given.items()}
    return Program(plan or spread_plan(), weights, world=World(0, RANKS, 2, 1.0))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("a slot holds an expert that is none of the 6", {"slots": [0, 1, 2, 3, 4, 6, 0, 1]}),
        ("expert 5 has no slot", {"slots": [0, 1, 2, 3, 4, 3, 0, 1]}),
        ("rank 3 holds an expert twice", {"slots": [0, 1, 2, 3, 4, 5, 0, 0]}),
        ("the shares of expert 0 do not sum to 1", {"shares": [0.5, 0.5, 1, 1, 1, 1, 0.25, 0.5]}),
        ("shares are negative or no numbers", {"shares": [1.5, 0.5, 1, 1, 1, 1, -0.5, 0.5]}),
        ("shares are negative or no numbers", {"shares": [float("nan"), 0.5, 1, 1, 1, 1, 0.5, 0.5]}),
    ],
)
def test_tables_that_are_no_placement_are_refused(message: str, changes: dict[str, list[Any]]) -> None:
    loaded()
    with pytest.raises(ArtifactError, match=f"the tables of layer 0 are not sound: {message}"):
        loaded(changes=changes)


def test_rows_of_others_that_need_own_inputs() -> None:
    """A rank without inputs cannot take part in such a plan."""
    plan = spread_plan()
    total = Call("aten.sum.default", [{"slot": 0}], {}, [20])
    plan.steps[3:4] = [total, Call("aten.add.Tensor", [{"slot": 7}, {"slot": 20}], {}, [10])]
    with pytest.raises(ArtifactError, match="depends on this rank's own inputs"):
        Idle(plan, loaded(plan)._runner, torch.device("cpu"))
    assert isinstance(loaded()._idle, Idle)


def test_a_program_of_one_device_has_no_others() -> None:
    plan = Plan([], [], [], {}, spread_plan().inputs, {"kind": "tuple", "items": []})
    plan.inputs["args"]["items"] = []
    program = Program(plan, {})
    program.finish()
    with pytest.raises(InputError, match="compiled for one device"):
        program.replan("plan.json")


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ("is not JSON", "{"),
        ("is no plan of format 'sparsec-placement'", {"format": "zip"}),
        ("gives its ranks .* slots", {"slots_per_rank": [3, 3, 3, 3]}),
        ("'layers' is not a list", {"layers": 0}),
        ("has not one row", {"split": []}),
        ("is for the layers 5, the program has 0", {"layers": [5]}),
        ("slots and shares are not lists of numbers", {"split": [["a"] * 8]}),
        ("slots and shares are not lists of numbers", {"physical_to_logical": [[True] * 8]}),
        ("expert 5 has no slot", {"physical_to_logical": [[0, 1, 2, 3, 4, 3, 0, 1]]}),
        ("there are 3 slots", {"physical_to_logical": [[0, 1, 2]]}),
    ],
)
def test_plans_that_a_program_cannot_go_over_to(tmp_path: Path, message: str, content: Any) -> None:
    sound: dict[str, Any] = {
        "format": "sparsec-placement", "version": 1, "slots_per_rank": [2] * 4, "layers": [0],
        "physical_to_logical": [TABLES["placement/0/slots"]], "split": [TABLES["placement/0/shares"]],
    }  # fmt: skip
    place = tmp_path / "plan.json"
    place.write_text(content if isinstance(content, str) else json.dumps(sound | content))
    with pytest.raises(InputError, match=message):
        loaded().replan(place)
    place.write_text(json.dumps(sound))
    assert list(loaded().replan(place)) == []  # the tables are these already
