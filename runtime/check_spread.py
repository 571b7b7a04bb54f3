"""Decides whether the exchanges of a plan that several ranks run may run: part of `runtime.check`.

A plan that passes gives every rank the same exchanges in the same order, each started once and waited for once, over
tables and banks that are as large as its ranks and slots say.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.plan import Arg, Exchange, Plan, Spread, Tensor

MAX_RANKS = 8192
POLICIES = ("static", "local", "batch")
DEDUPS = ("none", "rank", "node")
ALGOS = ("flat", "two_level")
PAYLOADS = ("model", "bf16", "fp8")
_FLOATS = ("f64", "f32", "bf16", "f16")


class _Rule(NamedTuple):
    """What an exchange takes: per operand the dtypes it may have (None: a handle in that state); attributes."""

    ins: tuple[tuple[str, ...] | str, ...]
    outs: int
    attrs: dict[str, type | tuple[str, ...]]
    leaves: tuple[str, str] | None = None  #: states of the handle taken, and of the handle made


_RULES: dict[str, _Rule] = {
    "remap": _Rule(
        (("i64", "i32"), ("i64",), ("f64",)), 1, {"experts": int, "ranks": int, "width": int, "policy": POLICIES}
    ),
    "dispatch_start": _Rule(
        (_FLOATS, ("i64",), _FLOATS),
        1,
        {"ranks": int, "width": int, "slots": int, "dedup": DEDUPS, "algo": ALGOS, "payload": PAYLOADS},
        ("", "dispatch started"),
    ),
    "dispatch_wait": _Rule(("dispatch started",), 3, {}, ("dispatch done", "")),
    "combine_start": _Rule((_FLOATS, "dispatch done"), 1, {}, ("over", "combine started")),
    "combine_wait": _Rule(("combine started",), 1, {}, ("over", "")),
}


@dataclass
class Handles:
    """The handles of a plan's exchanges, by slot, while its steps are checked in order.

    Args:
        spread: as of the plan; None where exchanges have no place.
        tables: slot of a table of slots -> its layer's experts and the slot of its shares.
    """

    spread: Spread | None
    tables: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    state: dict[int, str] = field(default_factory=dict[int, str])

    @staticmethod
    def of(plan: Plan) -> Handles:
        """For the steps of `plan`, whose `spread` is sound."""
        by_source = {arg.source: arg.slot for arg in plan.args if arg.kind == "buffer"}
        layers = plan.spread.layers if plan.spread is not None else []
        tables = {by_source[layer.slots]: (layer.experts, by_source[layer.shares]) for layer in layers}
        return Handles(plan.spread, tables)

    def take(self, step: Exchange, where: str) -> list[int]:
        """Check a step and go on to the handles' next states. Returns: the slots that it reads as tensors."""
        rule, where = _RULES.get(step.op), f"{where} ({step.op})"
        if rule is None:
            raise ArtifactError(f"{where} is no exchange (there are: {', '.join(_RULES)})")
        if self.spread is None:
            raise ArtifactError(f"{where} exchanges rows, but the plan is not spread over ranks")
        if (len(step.ins), len(step.outs), len(step.types)) != (len(rule.ins), rule.outs, len(rule.ins)):
            raise ArtifactError(f"{where} takes {len(rule.ins)} values to {rule.outs}, with their types")
        self._check_attrs(step, rule, where)
        reads = list[int]()
        for slot, type, wanted in zip(step.ins, step.types, rule.ins, strict=True):
            if isinstance(wanted, str):
                if self.state.get(slot) != wanted:
                    found = self.state.get(slot, "no handle")
                    raise ArtifactError(f"{where} takes a handle in the state '{wanted}', slot {slot} is: {found}")
                self.state[slot] = rule.leaves[0] if rule.leaves else "over"
            else:
                if type is None or type.dtype not in wanted:
                    raise ArtifactError(f"{where} reads slot {slot}, which is no tensor of {' or '.join(wanted)}")
                reads.append(slot)
        if step.op == "remap" and self.tables.get(step.ins[1]) != (step.attrs["experts"], step.ins[2]):
            raise ArtifactError(f"{where} reads tables that are not those of one layer of the plan")
        return reads

    def give(self, step: Exchange, defined: set[int], where: str) -> list[int]:
        """The slots in which a step leaves tensors; those of handles are noted."""
        for slot in step.outs:
            if slot in self.state or slot in defined or step.outs.count(slot) > 1:
                raise ArtifactError(f"{where} ({step.op}) writes slot {slot}, which is taken")
        made = _RULES[step.op].leaves
        if made is not None and made[1]:
            self.state[step.outs[0]] = made[1]
            return []
        return step.outs

    def free(self, slots: Iterable[int], where: str) -> list[int]:
        """Drop the handles among `slots`. Returns: the others."""
        others = list[int]()
        for slot in slots:
            if slot not in self.state:
                others.append(slot)
            elif self.state[slot] != "over":
                raise ArtifactError(f"{where} drops slot {slot}, the handle of an exchange that is not over")
            else:
                del self.state[slot]
        return others

    def finish(self) -> None:
        """Raises: ArtifactError where an exchange was not brought to its end."""
        for slot, state in self.state.items():
            if state != "over":
                raise ArtifactError(f"the plan ends with the exchange of slot {slot} in the state '{state}'")

    def _check_attrs(self, step: Exchange, rule: _Rule, where: str) -> None:
        attrs, spread = step.attrs, self.spread
        assert spread is not None
        if set(attrs) != set(rule.attrs):
            raise ArtifactError(f"{where} has the attributes {sorted(attrs)}, it takes {sorted(rule.attrs)}")
        for name, wanted in rule.attrs.items():
            value: Any = attrs[name]
            fits = value in wanted if isinstance(wanted, tuple) else type(value) is wanted
            if not fits:
                said = " or ".join(wanted) if isinstance(wanted, tuple) else "a number"
                raise ArtifactError(f"{where} has {name} = {value!r}, which must be {said}")
        for name, value in (("ranks", spread.ranks), ("width", spread.width), ("slots", spread.slots)):
            if attrs.get(name, value) != value:
                raise ArtifactError(f"{where} has {name} = {attrs[name]}, the plan has {value}")
        if attrs.get("dedup") == "node" and attrs.get("algo") != "two_level":
            raise ArtifactError(f"{where}: dedup 'node' goes with algo 'two_level'")


def check_spread(plan: Plan) -> None:
    """Check sizes, tables and banks of `plan.spread`. Raises: ArtifactError."""
    spread = plan.spread
    if spread is None:
        return
    if not 1 <= spread.ranks <= MAX_RANKS or spread.slots < 1:
        raise ArtifactError(f"the plan is spread over {spread.ranks} ranks of {spread.slots} slots")
    if spread.width < 1 or spread.ranks % spread.width:
        raise ArtifactError(f"the plan has {spread.ranks} ranks, which are not nodes of {spread.width}")
    names = [layer.name for layer in spread.layers]
    if len(names) != len(set(names)):
        raise ArtifactError("two layers of experts of the plan have one name")
    args = {arg.source: arg for arg in plan.args if arg.stored}
    count, seen = spread.ranks * spread.slots, set[str]()
    for layer in spread.layers:
        where = f"layer {layer.name}"
        if not 1 <= layer.experts <= count:
            raise ArtifactError(f"{where} has {layer.experts} experts in {count} slots")
        for source, dtype in ((layer.slots, "i64"), (layer.shares, "f64")):
            arg = args.get(source)
            if arg is None or arg.kind != "buffer" or arg.type != Tensor((count,), dtype):
                raise ArtifactError(f"{where}: the table '{source}' is no buffer [{count}] {dtype} of the plan")
        if any(output.source in (layer.slots, layer.shares) for output in plan.outputs if output.kind == "mutation"):
            raise ArtifactError(f"{where}: the plan changes its tables")
        for source in layer.banks:
            if source in seen or not _is_bank(args.get(source), spread.slots):
                raise ArtifactError(f"{where}: '{source}' is no weight of {spread.slots} slots, or named twice")
            seen.add(source)


def _is_bank(arg: Arg | None, slots: int) -> bool:
    return arg is not None and arg.kind == "param" and arg.type is not None and arg.type.shape[:1] == (slots,)
