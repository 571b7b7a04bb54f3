"""Why a module looks as it does: what was fused at which of the user's lines and by which rule, what was not, and why.

    model.layers.0.mlp
      fused   moe.route from 5 ops                 modeling_mixtral.py:106   passes/raise_route.py:42 (raise_route)
      missed  the router has no top-k ...          modeling_mixtral.py:131   raise-route
              try: ...   worth about 40 us: 9 launches, 1.2 MB between them

What a missed fusion is worth is an estimate on one chip: of the ops that stand where it was declined (same layer, or
same line where that is not known), all but one launch, and the time that the tensors between them take through memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from sparsec.diagnostics import Remark, SparsecError
from sparsec.inspect.costs import OpCost, Roof, op_costs, sizes
from sparsec.inspect.dump import text_of
from sparsec.ir.core import Module, Op
from sparsec.ir.loc import Loc
from sparsec.ir.parser import parse_module
from sparsec.ir.types import TensorType, evaluate, product
from sparsec.passes.roofline import LAUNCH
from sparsec.pipeline import Result


@dataclass(frozen=True)
class Gain:
    """What fusing some ops into one would save.

    Args:
        launches: fewer.
        bytes: that need no longer go through memory.
        us: both, in time on the chip.
    """

    launches: int
    bytes: int
    us: float


@dataclass(frozen=True)
class Finding:
    """One thing that was done or declined.

    Args:
        kind: `fused`, `placed` (on several devices), or `missed`.
        layer: dotted path of the user's module, "" where it is not known.
        place: the user's line, and those of all ops that were fused.
        what: the op that was made and from what; of a missed one, why.
        rule: the rule and its own line, or the pass.
        try_: what the user can do.
        gain: of a missed one: what it may be worth.
    """

    kind: Literal["fused", "placed", "missed"]
    layer: str
    place: Loc
    what: str
    rule: str
    try_: str = ""
    gain: Gain | None = None


@dataclass(frozen=True)
class History:
    """What became of a module.

    Args:
        first: as captured, or as the passes began with it.
        final: after the last pass.
        made: op -> the rule that made it, and from what; of all passes, in their order.
        remarks: of passes and of code generation.
    """

    first: Module
    final: Module
    made: Mapping[Op, str]
    remarks: Sequence[Remark]


def of_result(result: Result, remarks: Sequence[Remark] = ()) -> History:
    """The history of a run, with further remarks."""
    return History(result.ir(next(iter(result.phases))), result.module, result.made, (*result.remarks, *remarks))


def of_dump(folder: Path) -> History:
    """The history that the run of a dump wrote down: nothing runs again. Raises: SparsecError for a damaged dump."""
    try:
        passes = json.loads((folder / "manifest.json").read_text())["passes"]
        files = [Path(str(entry["file"])).name for entry in passes if "file" in entry]
        rules = {Path(name).name: lines for name, lines in _optional_json(folder / "made.json").items()}
        made, modules = dict[Op, str](), dict[str, Module]()
        for name in files:
            text = (folder / name).read_text()
            lines, own = text.splitlines(), rules.get(name, {})
            ours = {int(line): str(by) for line, by in own.items() if " = moe." in lines[int(line) - 1]}
            if not ours and name not in (files[0], files[-1]):
                continue
            modules[name] = parse_module(text, name)
            ops = {line: op for op, line in text_of(modules[name]).places.items()}
            made |= {ops[line]: by for line, by in ours.items()}
        lines = (folder / "remarks.jsonl").read_text().splitlines()
        remarks = [_remark(json.loads(line)) for line in lines]
        return History(modules[files[0]], modules[files[-1]], made, remarks)
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise SparsecError(f"{folder} is no whole run of a dump: {type(error).__name__}: {error}") from error


def _optional_json(path: Path) -> dict[str, Any]:
    found: Any = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _remark(given: dict[str, Any]) -> Remark:
    said = {field.name: given[field.name] for field in fields(Remark) if field.name != "loc"}
    return Remark(loc=Loc(**given["loc"]), **said)


def explain(history: History, on: Roof, given: Mapping[str, int]) -> list[Finding]:
    """Everything that was done and declined, by layers in the order of the model, what was missed last.

    Args:
        on: the chip that gains are given for.
        given: sizes, as of `costs.sizes`.

    Raises: SparsecError for a size that the module does not have.
    """
    final = history.final
    env = sizes(final, given)
    costs = op_costs(final, env, on)
    main = [op for op in final.main.body.ops if op in costs]
    found = list(_fused(history.made))
    for remark in history.remarks:
        if remark.kind == "passed" and remark.pass_name in _PLACING:
            found.append(Finding("placed", remark.loc.scope, remark.loc, remark.message, remark.pass_name))
        elif remark.kind == "missed":
            gain = _gain(_neighbours(main, remark.loc), costs, env, on)
            rule = f"{remark.rule} in {remark.pass_name}" if remark.rule else remark.pass_name
            found.append(Finding("missed", remark.loc.scope, remark.loc, remark.message, rule, remark.suggestion, gain))
    order = {scope: i for i, scope in enumerate(_scopes(history.first))}
    kinds = get_args(get_type_hints(Finding)["kind"])
    return sorted(found, key=lambda one: (order.get(one.layer, len(order)), kinds.index(one.kind)))


def select(findings: Iterable[Finding], *, layer: str = "", file: str = "", rule: str = "") -> list[Finding]:
    """Those of a layer (a pattern, `model.layers.*.mlp`, or the start of its path), a user's file (a part of its path,
    `model.py:104` with a line), a rule or a pass (a part of its name)."""
    return [one for one in findings if _of_layer(one, layer) and _of_file(one, file) and rule in one.rule]


def _of_layer(one: Finding, layer: str) -> bool:
    return not layer or fnmatchcase(one.layer, layer) or f"{one.layer}.".startswith(f"{layer}.")


def _of_file(one: Finding, file: str) -> bool:
    name, _, line = file.rpartition(":") if ":" in file else (file, "", "")
    places = (one.place, *one.place.origins)
    return not file or any(name in place.file and (not line or str(place.line) == line) for place in places)


def _fused(made: Mapping[Op, str]) -> Iterator[Finding]:
    """The ops of our own that rules made; the last of several that are alike stands for them."""
    kept = dict[tuple[str, str, str, str], Finding]()
    for op, origin in made.items():
        if op.name.startswith("moe."):
            rule, _, source = origin.rpartition(" from ")
            places = len({(place.file, place.line) for place in (op.loc, *op.loc.origins)})
            lines = f", {places} lines" if places > 1 else ""
            one = Finding("fused", op.loc.scope, op.loc, f"{op.name} from {source}{lines}", rule)
            kept[one.layer, str(one.place), op.name, rule] = one
    yield from kept.values()


_PLACING = ("place-experts", "overlap")  # passes whose remarks say where experts run


def _scopes(module: Module) -> Iterator[str]:
    return iter(dict.fromkeys(op.loc.scope for op in module.main.body.ops))


def _neighbours(ops: Sequence[Op], place: Loc) -> list[Op]:
    """The ops that stand where something was declined."""
    if place.scope:
        return [op for op in ops if op.loc.scope == place.scope]
    return [op for op in ops if (op.loc.file, op.loc.line) == (place.file, place.line)]


def _gain(ops: Sequence[Op], costs: Mapping[Op, OpCost], env: Mapping[str, int], on: Roof) -> Gain | None:
    """What one kernel in place of some ops would save: launches, and what they pass to each other alone."""
    busy = [op for op in ops if costs[op].bytes]
    if len(busy) < 2:
        return None
    together, moved = set(busy), 0
    for op in busy:
        for result in op.results:
            if isinstance(result.type, TensorType) and result.users and together.issuperset(result.users):
                size = evaluate(product(result.type.shape), env) * result.type.dtype.itemsize
                moved += size * (1 + len(result.users))
    launches = len(busy) - 1
    return Gain(launches, moved, (launches * LAUNCH + moved / on.bandwidth) * 1e6)
