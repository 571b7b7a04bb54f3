"""What is wrong in a pass: the first op whose value is off though what it reads was right, and what changed at it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from sparsec.diagnostics import CompileError
from sparsec.inspect.check import relative
from sparsec.inspect.forced import Choices
from sparsec.inspect.structural import partners
from sparsec.inspect.unified import changed_lines
from sparsec.ir.core import Func, Module, Op, Value
from sparsec.ir.interp import evaluate_module
from sparsec.ir.loc import UNKNOWN, Loc
from sparsec.ir.printer import Printer, print_op
from sparsec.pipeline import PassRecord


@dataclass(frozen=True)
class Piece:
    """An op (or a function that makes a weight) as text, the user's line, and the rule that made or removed it."""

    text: str
    loc: Loc = UNKNOWN
    by: str = ""


@dataclass(frozen=True)
class Culprit:
    """What is wrong.

    Args:
        kind: a `pass`, or a `kernel`.
        name: of the pass with its options, or of the kernel.
        phase: of the pass.
        error: of the results after the pass, or of the kernel's; relative to the largest value.
        op: the first op whose value is wrong, as text; of a kernel the op that it computes.
        loc: the user's line that it comes down to.
        was: how the op read before, "" where it reads the same.
        value: which number is furthest off, and what is right.
        operands: what it reads that is off, though it read what was right before.
        gone: ops that it read before, and that the pass removed.
        made: ops that the pass put in front of it.
        rules: what the pass did, and how often.
        at: the user's line of `op`.
    """

    kind: Literal["pass", "kernel"]
    name: str
    phase: str
    error: float
    op: str
    loc: Loc
    was: str = ""
    value: str = ""
    operands: tuple[str, ...] = ()
    gone: tuple[Piece, ...] = ()
    made: tuple[Piece, ...] = ()
    rules: Mapping[str, int] | None = None
    at: Loc = UNKNOWN


def distance(ours: Any, right: Any) -> float:
    """The largest difference of two values, relative to the largest; infinite where they cannot be compared."""
    if not isinstance(ours, Tensor) or not isinstance(right, Tensor):
        return 0.0 if ours == right else float("inf")
    return relative(ours, right) if ours.shape == right.shape else float("inf")


def find_culprit(
    record: PassRecord,
    before: tuple[Module, Mapping[Op, Op]],
    after: Module,
    weights: Mapping[str, Tensor],
    inputs: Sequence[Any],
    choices: Choices,
    tolerance: float,
    error: float,
) -> Culprit:
    """The op of a wrong pass: the first that was kept, or returns, whose value differs, and what changed at it.

    Args:
        before: a copy of the module in front of the pass, and which op of the copy is which op of the pass.
        inputs: some that the results are off for.
        choices: those of the captured module for these inputs.
    """
    copy, originals = before
    right, wrong = _values(copy, inputs, weights, choices), _values(after, inputs, weights, choices)
    ops, values = partners(copy.main, after.main)
    old_op, old_value = {new: old for old, new in ops.items()}, {new: old for old, new in values.items()}
    op = after.main.body.terminator
    for one in after.main.body.ops:
        if one in old_op and any(_off(v, old_value.get(v), wrong, right) > tolerance for v in one.results):
            op = one
            break
        if any(result not in wrong for result in one.results if result.users):
            op = one  # it fails
            break
    ends = op is after.main.body.terminator
    old = copy.main.body.terminator if ends else old_op.get(op)
    gone = [
        Piece(print_op(v.op), v.op.loc, record.gone.get(originals.get(v.op, v.op), ""))
        for v in (() if old is None else old.operands)
        if v.op is not None and v.op not in ops
    ]
    fine = _standing_for_equals(record, originals, wrong, right, tolerance)
    made = [Piece(print_op(new), new.loc, record.made.get(new, "")) for new in _put_before(op, old_op, fine)]
    made += _derived(op, old, after, copy)
    was = "" if old is None or ends or print_op(old) == print_op(op) else print_op(old)
    pairs = [(wrong.get(v), right.get(old_value[v])) for v in op.results if v in old_value]
    number = next((text for ours, known in pairs if (text := _number(ours, known))), "")
    operands = () if old is None else tuple(_operands(old, op, right, wrong, tolerance))
    places = [*(piece.loc for piece in (*gone, *made)), op.loc]
    loc = next((place for place in places if place), UNKNOWN)
    return Culprit(
        "pass", record.name, record.phase, error, print_op(op), loc, was, number, operands, tuple(gone), tuple(made),
        dict(record.counts), op.loc,
    )  # fmt: skip


def _off(new: Value, old: Value | None, wrong: Mapping[Value, Any], right: Mapping[Value, Any]) -> float:
    return 0.0 if old is None or old not in right or new not in wrong else distance(wrong[new], right[old])


def _number(ours: Any, right: Any) -> str:
    """Where two tensors are furthest apart, and what is there."""
    if not isinstance(ours, Tensor) or not isinstance(right, Tensor) or not ours.numel():
        return ""
    if ours.shape != right.shape:
        return f"of shape {list(ours.shape)}, where {list(right.shape)} is right"
    apart = (ours.double() - right.double()).abs().nan_to_num(float("inf"))
    at = [int(i) for i in torch.unravel_index(apart.argmax(), ours.shape)]
    return f"at {at}: {ours[tuple(at)].item():.6g}, where {right[tuple(at)].item():.6g} is right"


def _operands(
    old: Op, new: Op, right: Mapping[Value, Any], wrong: Mapping[Value, Any], tolerance: float
) -> Iterator[str]:
    """Of an op that was kept: the operands whose values are others than before."""
    for before, after in zip(old.operands, new.operands, strict=False):
        if _off(after, before, wrong, right) > tolerance:
            yield f"%{after.name}, where it read %{before.name}, is wrong {_number(wrong[after], right[before])}"


def _standing_for_equals(
    record: PassRecord,
    originals: Mapping[Op, Op],
    wrong: Mapping[Value, Any],
    right: Mapping[Value, Any],
    tolerance: float,
) -> set[Value]:
    """The values that a rule put in the place of others, and that are what those were."""
    copies = {original: copy for copy, original in originals.items()}
    pairs = [(new, old.index, copies.get(old.op)) for new, old in record.replaced.items() if old.op is not None]
    olds = [(new, copy.results[index]) for new, index, copy in pairs if copy is not None]
    return {new for new, old in olds if new in wrong and old in right and _off(new, old, wrong, right) <= tolerance}


def _put_before(op: Op, kept: Mapping[Op, Op], fine: Container[Value]) -> Iterator[Op]:
    """The ops that the pass made and whose results `op` reads, directly or through others that it made, in their order;
    without those whose results are what they stand for."""
    seen, open_ = set[Op](), [op]
    while open_:
        for value in open_.pop().operands:
            if value.op is not None and value.op not in kept and value.op not in seen and value not in fine:
                seen.add(value.op)
                open_.append(value.op)
    block = op.block
    yield from (one for one in (block.ops if block is not None else ()) if one in seen and one.operands)


def _derived(op: Op, old: Op | None, after: Module, before: Module) -> list[Piece]:
    """How weights are made that the op reads, and did not read before."""
    known = [] if old is None else [before.main.arg_attrs.get(v, {}).get("source") for v in old.operands]
    found = list[Piece]()
    for value in dict.fromkeys(op.operands):
        attrs = after.main.arg_attrs.get(value, {})
        if attrs.get("kind") == "derived" and attrs.get("source") not in known:
            func = after.funcs.get(str(attrs.get("function")))
            if func is not None:
                found.append(Piece(_text(func), op.loc, f"the pass: the weight %{value.name}"))
    return found


def _text(func: Func) -> str:
    printer = Printer()
    printer.func(func)
    return "\n".join(printer.lines)


def _values(module: Module, inputs: Sequence[Any], weights: Mapping[str, Tensor], choices: Choices) -> dict[Value, Any]:
    """What every op of `main` computes, as far as that goes."""
    found = dict[Value, Any]()

    def observe(op: Op, results: tuple[Any, ...]) -> None:
        if op.block is module.main.body:
            found.update(zip(op.results, results, strict=True))

    with suppress(CompileError):  # what was computed up to there is what there is to compare
        evaluate_module(module, inputs, weights, observer=observe, override=choices.force)
    return found


def describe(culprit: Culprit) -> str:
    """The finding as an error's text."""
    place = f"{culprit.loc}: " if culprit.loc else ""
    size = "they cannot be computed" if culprit.error == float("inf") else f"{culprit.error:.1e} of the largest value"
    lines = [f"{place}error: {culprit.kind} '{culprit.name}' makes wrong numbers: {size}"]
    lines += [f"    {culprit.loc.source.strip()}"] if culprit.loc.source.strip() else []
    if culprit.kind == "kernel":
        lines += [f"  the kernel computes this op{_at(culprit.at)}:", *_indented(culprit.op)]
        lines += [f"  {culprit.value}"] if culprit.value else []
        return "\n".join(lines)
    lines.append(f"  the first wrong value{_at(culprit.at)}:")
    lines += [f"    {line}" for line in changed_lines(culprit.was or culprit.op, culprit.op)]
    lines += [f"    {culprit.value}"] if culprit.value else []
    lines += [f"  its operand {operand}" for operand in culprit.operands]
    for piece in culprit.gone:
        lines += [f"  it read{_at(piece.loc)}, removed{_by(piece)}:", *_indented(piece.text)]
    for head, pieces in groupby(culprit.made, key=lambda piece: f"{_at(piece.loc)}, made{_by(piece)}"):
        lines += [f"  it reads now{head}:", *(line for piece in pieces for line in _indented(piece.text))]
    if culprit.rules:
        lines.append(f"  the pass did: {', '.join(f'{rule} {count}x' for rule, count in culprit.rules.items())}")
    return "\n".join(lines)


def _at(loc: Loc) -> str:
    more = sorted({place.line for place in loc.origins if place.file == loc.file} - {loc.line})
    fused = f" (with {', '.join(map(str, more))})" if more else ""
    return f", at {loc}{fused}" if loc else ""


def _by(piece: Piece) -> str:
    return f" by {piece.by}" if piece.by else " by the pass"


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]
