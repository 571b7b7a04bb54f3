"""Which pass, op or kernel makes a wrong number: found by evaluating the module after every pass.

The module as captured says what is right: its ops' references, in f32 whatever the model's element type, so that the
passes' freedom to reorder arithmetic stays far below the tolerance. The first pass whose result is further off is
named; in it, the first op whose value differs though everything that it reads, and that the pass kept, is right; with
the ops and the rules that the pass put in front of it. Where every pass is right, each kernel of the model as it is, in
its own element types, is run on what the reference interpreter feeds it, and compared with the reference of its op.

A tie between experts may fall the other way after a rewrite, which is no bug and changes everything behind it: a pass
is guilty only if it is off on every one of several inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sparsec import pipeline
from sparsec.codegen.emit import emit
from sparsec.diagnostics import CompileError
from sparsec.dialects.kernel import Launch
from sparsec.inspect.check import relative
from sparsec.inspect.structural import partners
from sparsec.ir.core import Attr, Func, Module, Op, Value
from sparsec.ir.equal import ValueMap, clone_block, clone_module
from sparsec.ir.interp import DerivedWeights, evaluate_module
from sparsec.ir.loc import Loc
from sparsec.ir.printer import print_op
from sparsec.ir.types import DType, SymType, TensorType, Type
from sparsec.passes.base import Pass
from sparsec.pipeline import Instrument, PassRecord
from sparsec.runtime.backends import bind
from sparsec.runtime.context import Context

TOLERANCE = 1e-3
"""Largest error, relative to the largest value, that counts as right in f32."""

NARROW_TOLERANCE = 3e-2
"""The same for kernels in bf16 and f16, which round along the way."""

_NARROW = (DType.bf16, DType.f16)


@dataclass(frozen=True)
class Step:
    """One pass that changed something: how far the results are from the captured module's."""

    phase: str
    name: str
    error: float


@dataclass(frozen=True)
class Culprit:
    """What is wrong.

    Args:
        kind: a `pass`, or a `kernel`.
        name: of the pass with its options, or of the kernel.
        phase: of the pass.
        error: of the results after the pass, or of the kernel's; relative to the largest value.
        op: the first op whose value is wrong, as text; of a kernel the op that it computes.
        loc: the user's line of it, with the places that were fused into it.
        made: ops that the pass put in front of it, as text, with the rules that made them.
        gone: ops that it read before, and that the pass removed.
    """

    kind: Literal["pass", "kernel"]
    name: str
    phase: str
    error: float
    op: str
    loc: Loc
    made: tuple[tuple[str, str], ...] = ()
    gone: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What a search found.

    Args:
        steps: passes that changed something, in order, up to the wrong one.
        kernels: error of every kernel that was run, by name; empty if a pass is wrong, or none could be run.
        culprit: None if everything is within tolerance.
        skipped: why kernels were not run; "" if they were.
    """

    steps: tuple[Step, ...]
    kernels: Mapping[str, float] = field(default_factory=dict[str, float])
    culprit: Culprit | None = None
    skipped: str = ""


def bisect(
    module: Module,
    weights: Mapping[str, Tensor],
    inputs: Sequence[Sequence[Any]],
    *,
    target: str = "cpu",
    tolerance: float = TOLERANCE,
    say: Callable[[str], None] = lambda what: None,
) -> Report:
    """Search the phases after `capture`, then the kernels.

    Args:
        module: as captured; it is not changed.
        inputs: values of its inputs, several times.
        tolerance: for results in f32.

    Raises: CompileError for what cannot be compiled or evaluated.
    """
    wide = widened(module)
    given = [[_wide(value) for value in values] for values in inputs]
    watch = _Watch(wide, {name: _wide(value) for name, value in weights.items()}, given, tolerance, say)
    try:
        pipeline.run(clone_module(wide), target=target, instruments=[watch])
    except _Found as found:
        return Report(tuple(watch.steps), culprit=found.culprit)
    steps = tuple(watch.steps)
    if target != "cpu" and not torch.cuda.is_available():
        return Report(steps, skipped=f"kernels for {target} were not run: there is no GPU here")
    lowered = pipeline.run(clone_module(module), target=target).module
    say("kernels")
    kernels, culprit = _kernels(lowered, weights, inputs[0], target, tolerance)
    return Report(steps, kernels, culprit)


def widened(module: Module) -> Module:
    """A copy that computes in f32 where the module does in bf16 or f16."""

    def dtype(value: DType) -> DType:
        return DType.f32 if value in _NARROW else value

    def map_type(type: Type) -> Type:
        return type if isinstance(type, SymType) else TensorType(type.shape, dtype(type.dtype))

    def map_attr(value: Attr) -> Attr:
        if isinstance(value, DType):
            return dtype(value)
        return tuple(map(map_attr, value)) if isinstance(value, tuple) else value

    copies = list[Func]()
    for func in module.funcs.values():
        values: ValueMap = {}
        copy = Func(func.name, clone_block(func.body, values, map_type, map_attr), func.attrs, func.loc)
        copy.arg_attrs = {values[arg]: dict(attrs) for arg, attrs in func.arg_attrs.items()}
        copy.result_attrs = {i: dict(attrs) for i, attrs in func.result_attrs.items()}
        copies.append(copy)
    return Module(copies, module.attrs)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) else value


class _Found(Exception):
    """A pass is wrong; ends the pipeline."""

    def __init__(self, culprit: Culprit) -> None:
        self.culprit = culprit


class _Watch(Instrument):
    """Evaluates the module after each pass that changed it."""

    def __init__(
        self,
        module: Module,
        weights: Mapping[str, Tensor],
        inputs: Sequence[Sequence[Any]],
        tolerance: float,
        say: Callable[[str], None],
    ) -> None:
        self.weights, self.inputs, self.tolerance, self.say = weights, inputs, tolerance, say
        self.right = [evaluate_module(module, values, weights) for values in inputs]
        self.steps: list[Step] = []
        self.last = clone_module(module)

    def before(self, phase: str, pass_: Pass, module: Module) -> None:
        self.say(f"{phase}: {pass_}")

    def after(self, record: PassRecord, module: Module) -> None:
        if not record.changed:
            return
        errors = [self._error(module, i) for i in range(len(self.inputs))]
        self.steps.append(Step(record.phase, record.name, min(errors)))
        if min(errors) > self.tolerance:
            worst = errors.index(max(errors))
            seen = _inside(record, self.last, module, self.weights, self.inputs[worst], self.tolerance, max(errors))
            raise _Found(seen)
        self.last = clone_module(module)

    def _error(self, module: Module, i: int) -> float:
        """How far the results are off; infinite where the module cannot be evaluated at all."""
        try:
            results = evaluate_module(module, self.inputs[i], self.weights)
        except CompileError:
            return float("inf")
        return max((_distance(ours, right) for ours, right in zip(results, self.right[i], strict=True)), default=0.0)


def _distance(ours: Any, right: Any) -> float:
    if not isinstance(ours, Tensor) or not isinstance(right, Tensor):
        return 0.0 if ours == right else float("inf")
    return relative(ours, right) if ours.shape == right.shape else float("inf")


def _inside(
    record: PassRecord,
    before: Module,
    after: Module,
    weights: Mapping[str, Tensor],
    inputs: Sequence[Any],
    tolerance: float,
    error: float,
) -> Culprit:
    """The op of a wrong pass: the first that was kept, or returns, whose value differs, and what was put before it."""
    right, wrong = _values(before, inputs, weights), _values(after, inputs, weights)
    ops, values = partners(before.main, after.main)
    old_op = {new: old for old, new in ops.items()}
    old_value = {new: old for old, new in values.items()}
    for op in after.main.body.ops:
        if op in old_op and any(_differs(v, old_value.get(v), wrong, right, tolerance) for v in op.results):
            break
        if any(result not in wrong for result in op.results if result.users):
            break  # it fails
    else:
        op = after.main.body.terminator
    last = before.main.body.terminator
    read = last if op is after.main.body.terminator else old_op.get(op)
    gone = [] if read is None else [v.op for v in read.operands if v.op is not None and v.op not in ops]
    made = tuple((print_op(new), record.made.get(new, "no rule")) for new in _put_before(op, old_op))
    loc = op.loc or next((old.loc for old in gone), op.loc)
    removed = tuple(print_op(old) for old in gone)
    return Culprit("pass", record.name, record.phase, error, print_op(op), loc, made, removed)


def _differs(
    new: Value, old: Value | None, wrong: Mapping[Value, Any], right: Mapping[Value, Any], tolerance: float
) -> bool:
    return old is not None and new in wrong and _off(new, old, wrong, right) > tolerance


def _off(new: Value, old: Value | None, wrong: Mapping[Value, Any], right: Mapping[Value, Any]) -> float:
    if old is None or old not in right or new not in wrong:
        return 0.0
    return _distance(wrong[new], right[old])


def _put_before(op: Op, kept: Mapping[Op, Op]) -> Iterator[Op]:
    """The ops that the pass made and whose results `op` reads, directly or through others that it made."""
    seen, open_ = dict[Op, None](), [op]
    while open_:
        for value in open_.pop().operands:
            if value.op is not None and value.op not in kept and value.op not in seen:
                seen[value.op] = None
                open_.append(value.op)
    yield from reversed(seen)


def _values(module: Module, inputs: Sequence[Any], weights: Mapping[str, Tensor]) -> dict[Value, Any]:
    """What every op of `main` computes, as far as that goes."""
    found = dict[Value, Any]()

    def observe(op: Op, results: tuple[Any, ...]) -> None:
        if op.block is module.main.body:
            found.update(zip(op.results, results, strict=True))

    with suppress(CompileError):  # what was computed up to there is what there is to compare
        evaluate_module(module, inputs, weights, observer=observe)
    return found


def _kernels(
    module: Module, weights: Mapping[str, Tensor], inputs: Sequence[Any], target: str, tolerance: float
) -> tuple[dict[str, float], Culprit | None]:
    """The error of every kernel on what the references feed it, and the first that is wrong."""
    emitted = emit(module, target, here=True)
    device = torch.device("cpu" if target == "cpu" else "cuda")
    context = Context(device, emitted.files, lambda slot: None, live=True, trust_code=True)
    held = DerivedWeights(module, weights)
    values = dict[Value, Any]()
    given = iter(inputs)
    for arg in module.main.body.args:
        attrs = module.main.arg_attrs.get(arg, {})
        values[arg] = next(given) if attrs.get("kind", "input") == "input" else held[str(attrs["source"])]
    errors = dict[str, float]()
    culprits = list[Culprit]()

    def run(value: Value, computed: Any) -> Any:
        values[value] = computed
        return computed

    def observe(op: Op, results: tuple[Any, ...]) -> None:
        if not isinstance(op, Launch):
            return
        kernel = emitted.plan.kernels[op.callee]
        call = bind(kernel, list(range(len(kernel.params))), context)
        taken = [None if value is None else values[value].to(device) for value in op.inputs]
        ours = [value.cpu() for value in call(taken)]
        inner = module.funcs[op.callee].body.ops[0]
        narrow = any(value.type.dtype in _NARROW for value in inner.results if isinstance(value.type, TensorType))
        error = max((_distance(a, b) for a, b in zip(ours, results, strict=True) if b.is_floating_point()), default=0.0)
        errors[op.callee] = max(errors.get(op.callee, 0.0), error)
        if error > (NARROW_TOLERANCE if narrow else tolerance) and not culprits:
            culprits.append(Culprit("kernel", op.callee, "emit", error, print_op(inner), op.loc))

    evaluate_module(module, inputs, weights, observer=observe, override=run)
    return errors, next(iter(culprits), None)
