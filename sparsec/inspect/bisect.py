"""Which pass, op or kernel makes a wrong number: found by evaluating the module after every pass.

The module as captured says what is right: its ops' references, in f32 whatever the model's element type, so that the
passes' freedom to reorder arithmetic stays far below the tolerance. Routing is forced: where a rewrite has a tie
between experts fall the other way, the captured module's choice is taken (`sparsec.inspect.forced`). The first pass
whose result is further off on any input is named; in it, the first op whose value differs though everything that it
reads, and that the pass kept, is right (`sparsec.inspect.culprit`). Where every pass is right, each kernel is run on
what the reference interpreter feeds it, and compared with the reference of its op (`sparsec.inspect.kernel_errors`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparsec import pipeline
from sparsec.diagnostics import CompileError
from sparsec.inspect.culprit import Culprit, distance, find_culprit
from sparsec.inspect.forced import Choices
from sparsec.inspect.kernel_errors import NARROW, interpreted_errors, kernel_errors
from sparsec.ir.core import Attr, Func, Module
from sparsec.ir.equal import ValueMap, clone_block, clone_module
from sparsec.ir.interp import evaluate_module
from sparsec.ir.types import DType, TensorType, Type
from sparsec.passes.base import Pass
from sparsec.pipeline import Instrument, PassRecord

TOLERANCE = 1e-3
"""Largest error, relative to the largest value, that counts as right in f32."""

INTERPRETED = 2
"""For how many of the inputs, the first ones, Triton's interpreter runs the kernels: it is slow."""


@dataclass(frozen=True)
class Step:
    """One pass that changed something: how far the results are from the captured module's."""

    phase: str
    name: str
    error: float


@dataclass(frozen=True)
class Report:
    """What a search found.

    Args:
        steps: passes that changed something, in order, up to the wrong one.
        kernels: error of every kernel that was run, by name; empty if a pass is wrong, or none could be run.
        culprit: None if everything is within tolerance.
        skipped: why kernels were not run, or not as they are; "" if they were.
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
    instruments: Sequence[Instrument] = (),
    say: Callable[[str], None] = lambda what: None,
) -> Report:
    """Search the phases after `capture`, then the kernels.

    Args:
        module: as captured; it is not changed.
        inputs: values of its inputs, several times.
        target: whose kernels; those of a GPU that is not here are run by Triton's interpreter, in f32.
        tolerance: for results in f32.
        instruments: others that watch the passes, such as a dump.

    Raises: CompileError for what cannot be compiled or evaluated.
    """
    wide = widened(module)
    given = [[_wide(value) for value in values] for values in inputs]
    known = {name: _wide(value) for name, value in weights.items()}
    watch = _Watch(wide, known, given, tolerance, say)
    try:
        lowered = pipeline.run(clone_module(wide), target=target, instruments=[*instruments, watch]).module
    except _Found as found:
        return Report(tuple(watch.steps), culprit=found.culprit)
    steps = tuple(watch.steps)
    say("kernels")
    if target != "cpu" and not torch.cuda.is_available():
        kernels, culprit, why = interpreted_errors(lowered, known, watch.inputs[:INTERPRETED], tolerance)
        return Report(steps, kernels, culprit, why)
    plain = all(arg.type == other.type for arg, other in zip(module.main.body.args, wide.main.body.args, strict=True))
    if plain:
        kernels, culprit = kernel_errors(lowered, known, watch.inputs, target, tolerance)
    else:
        lowered = pipeline.run(clone_module(module), target=target).module
        kernels, culprit = kernel_errors(lowered, weights, [inputs[i] for i in watch.taken], target, tolerance)
    return Report(steps, kernels, culprit)


def widened(module: Module) -> Module:
    """A copy that computes in f32 where the module does in bf16 or f16."""

    def dtype(value: DType) -> DType:
        return DType.f32 if value in NARROW else value

    def map_type(type: Type) -> Type:
        return TensorType(type.shape, dtype(type.dtype)) if isinstance(type, TensorType) else type

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
        self.weights, self.tolerance, self.say = weights, tolerance, say
        self.taken, self.choices, self.right = list[int](), list[Choices](), list[list[Any]]()
        problem: CompileError | None = None
        for i, values in enumerate(inputs):
            choices = Choices(module)
            try:
                right = evaluate_module(module, values, weights, observer=choices.observe)
            except CompileError as error:
                problem = error  # of a number of tokens that the model is not made for
                continue
            self.taken.append(i)
            self.choices.append(choices)
            self.right.append(right)
        if problem is not None and not self.taken:
            raise problem
        self.inputs = [inputs[i] for i in self.taken]
        if any(isinstance(one, Tensor) and bool(one.isnan().any()) for results in self.right for one in results):
            raise CompileError(
                "the model itself gives NaN on random inputs: nothing can be told from its results",
                hint="give it weights (--random-weights makes some up for a model of transformers)",
            )
        self.steps: list[Step] = []

    def before(self, phase: str, pass_: Pass, module: Module) -> None:
        self.say(f"{phase}: {pass_}")
        if not self.steps:
            self._keep(module)

    def after(self, record: PassRecord, module: Module) -> None:
        if not record.changed:
            return
        errors = [self._error(module, i) for i in range(len(self.inputs))]
        error = max(errors)
        self.steps.append(Step(record.phase, record.name, error))
        if error > self.tolerance:
            worst = errors.index(error)
            raise _Found(
                find_culprit(
                    record, self.last, module, self.weights, self.inputs[worst], self.choices[worst], self.tolerance,
                    error,
                )
            )  # fmt: skip
        self._keep(module)

    def _keep(self, module: Module) -> None:
        """Remember the module as it is: a copy, and which op of the copy is which."""
        copy = clone_module(module)
        self.last = copy, dict(zip(copy.walk(), module.walk(), strict=True))

    def _error(self, module: Module, i: int) -> float:
        """How far the results are off; infinite where the module cannot be evaluated at all."""
        try:
            results = evaluate_module(module, self.inputs[i], self.weights, override=self.choices[i].force)
        except CompileError:
            return float("inf")
        return max((distance(ours, right) for ours, right in zip(results, self.right[i], strict=True)), default=0.0)
