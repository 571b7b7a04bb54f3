"""How far each kernel of a lowered module is from the reference of the op that it computes, on real operands.

The reference interpreter runs the module; a kernel gets what it feeds the kernel's launch. Kernels for a GPU that is
not here are run by Triton's interpreter, in a process of its own (`sparsec.inspect.interpreted`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsec.codegen.emit import emit
from sparsec.dialects.kernel import Launch
from sparsec.dialects.moe import Layer, Route, RouteGroup
from sparsec.inspect.culprit import Culprit, distance
from sparsec.inspect.forced import CLOSE, Choices
from sparsec.ir.core import Func, Module, Op, Value
from sparsec.ir.equal import clone_func
from sparsec.ir.interp import DerivedWeights, evaluate_module
from sparsec.ir.printer import print_module, print_op
from sparsec.ir.types import DType, TensorType
from sparsec.runtime.backends import bind
from sparsec.runtime.context import Context

NARROW_TOLERANCE = 3e-2
"""Largest error of kernels in bf16 and f16, which round along the way."""

NARROW = (DType.bf16, DType.f16)

SECONDS = 120.0
"""How long Triton's interpreter may take for all kernels of a module."""


@dataclass(frozen=True)
class _Call:
    """One launch: its kernel function, what the interpreter fed it, holes left out, and what the reference made."""

    func: Func
    launch: Op
    operands: tuple[Any, ...]
    results: tuple[Tensor, ...]


def kernel_errors(
    module: Module, weights: Mapping[str, Tensor], inputs: Sequence[Sequence[Any]], target: str, tolerance: float
) -> tuple[dict[str, float], Culprit | None]:
    """The error of every kernel on this machine, and the first that is wrong.

    Args:
        inputs: values of the module's inputs, several times: each number of tokens may have kernels of its own.

    Raises: CompileError.
    """
    emitted = emit(module, target, here=True)
    device = torch.device("cpu" if target == "cpu" else "cuda")
    context = Context(device, emitted.files, lambda slot: None, live=True, trust_code=True)

    def run(call: _Call) -> Sequence[Tensor]:
        kernel = emitted.plan.kernels[call.func.name]
        bound = bind(kernel, list(range(len(kernel.params))), context)
        return [value.cpu() for value in bound([None if v is None else v.to(device) for v in call.operands])]

    return _compared([call for values in inputs for call in _calls(module, weights, values)], run, tolerance)


def interpreted_errors(
    module: Module, weights: Mapping[str, Tensor], inputs: Sequence[Sequence[Any]], tolerance: float
) -> tuple[dict[str, float], Culprit | None, str]:
    """The same by Triton's interpreter, for each kernel's first launch of a run; and what is to be said about it."""
    from safetensors.torch import load_file, save_file

    calls = dict[str, _Call]()
    for i, values in enumerate(inputs):
        for call in _calls(module, weights, values):
            calls.setdefault(f"{i}.{call.func.name}", call)
    with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
        Path(folder, "module.sparsec").write_text(print_module(module), encoding="utf-8")
        for place, call in calls.items():
            given = {str(i): v.contiguous().clone() for i, v in enumerate(call.operands) if v is not None}
            save_file(given, Path(folder, f"{place}.in.safetensors"))
        command = [sys.executable, "-W", "ignore", "-m", "sparsec.inspect.interpreted", folder, *calls]
        env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return (
                {},
                None,
                f"kernels were not run: no GPU is here, and Triton's interpreter takes over {SECONDS:g} s",
            )
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            return {}, None, f"kernels were not run: there is no GPU here, and Triton's interpreter failed: {last}"
        made = {id(call): load_file(Path(folder, f"{place}.out.safetensors")) for place, call in calls.items()}
    found = _compared(
        list(calls.values()), lambda call: [made[id(call)][str(i)] for i in range(len(call.results))], tolerance
    )
    return *found, "kernels were run by Triton's interpreter in f32: there is no GPU here"


def _calls(module: Module, weights: Mapping[str, Tensor], inputs: Sequence[Any]) -> list[_Call]:
    """Every launch of a run of the module."""
    held, given = DerivedWeights(module, weights), iter(inputs)
    values = dict[Value, Any]()
    for arg in module.main.body.args:
        attrs = module.main.arg_attrs.get(arg, {})
        values[arg] = next(given) if attrs.get("kind", "input") == "input" else held[str(attrs["source"])]
    calls = list[_Call]()

    def keep(value: Value, computed: Any) -> Any:
        values[value] = computed
        return computed

    def observe(op: Op, results: tuple[Any, ...]) -> None:
        if isinstance(op, Launch):
            operands = tuple(None if value is None else values[value] for value in op.inputs)
            calls.append(_Call(module.funcs[op.callee], op, operands, results))

    evaluate_module(module, inputs, weights, observer=observe, override=keep)
    return calls


def _compared(
    calls: Sequence[_Call], run: Callable[[_Call], Sequence[Tensor]], tolerance: float
) -> tuple[dict[str, float], Culprit | None]:
    """The largest error of each kernel, and the first that is wrong, where it is worst."""
    errors, culprit = dict[str, float](), None
    for call in calls:
        name, op = call.func.name, call.func.body.ops[0]
        narrow = any(value.type.dtype in NARROW for value in op.results if isinstance(value.type, TensorType))
        allowed = NARROW_TOLERANCE if narrow else tolerance
        ours = run(call)
        right: Sequence[Tensor] = call.results
        if _error(ours, right) > allowed:
            right = _with_choices_of(ours, call, NARROW_TOLERANCE if narrow else CLOSE)
        error = _error(ours, right)
        errors[name] = max(errors.get(name, 0.0), error)
        if error > allowed and (culprit is None or (culprit.name == name and error > culprit.error)):
            value = _worst(op, ours, right)
            culprit = Culprit("kernel", name, "emit", error, print_op(op), call.launch.loc, value=value, at=op.loc)
    return errors, culprit


def _error(ours: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return max(map(_apart, ours, right), default=0.0)


def _apart(ours: Tensor, right: Tensor) -> float:
    """How far a result is off; whole numbers are right or wrong (1.0), and -1 stands for what is not defined."""
    if right.is_floating_point() or ours.shape != right.shape:
        return distance(ours, right)
    return float(bool(((ours != right) & (right != -1)).any()))


def _worst(op: Op, ours: Sequence[Tensor], right: Sequence[Tensor]) -> str:
    """Which result of a kernel is furthest off, in how many places, and where it is worst."""
    i = max(range(len(right)), key=lambda i: _apart(ours[i], right[i]))
    name, a, b = op.results[i].name or f"result {i}", ours[i].double(), right[i].double()
    if a.shape != b.shape:
        return f"%{name} is of shape {list(a.shape)}, right is {list(b.shape)}"
    apart = (a - b).abs().nan_to_num(float("inf"))
    off = apart > (1e-3 * b.abs().max() if right[i].is_floating_point() else 0)
    at = [int(n) for n in torch.unravel_index(apart.argmax(), apart.shape)]
    where = f"at {at} it is {a[tuple(at)].item():.6g}, right is {b[tuple(at)].item():.6g}"
    fine = [f"%{v.name}" for v, x, y in zip(op.results, ours, right, strict=True) if v.name and _apart(x, y) < 1e-3]
    others = f"; {', '.join(fine)} as it should be" if fine else ""
    return f"%{name} is wrong in {int(off.sum())} of {off.numel()} places; {where}{others}"


def _with_choices_of(ours: Sequence[Tensor], call: _Call, close: float) -> Sequence[Tensor]:
    """What the reference makes where its router takes the experts that the kernel chose, if they are as good."""
    op = call.func.body.ops[0]
    if not isinstance(op, Layer | Route | RouteGroup):
        return call.results
    copy = clone_func(call.func)
    copy.name = "main"
    alone, router = Module([copy]), copy.body.ops[0]
    assert isinstance(router, Layer | Route | RouteGroup)
    operands = [value for value in call.operands if value is not None]
    choices, known = Choices(alone, close), dict(zip(copy.body.args, operands, strict=True))
    read = zip(router.regions[0].args, (router.logits, *_params(router)), strict=True)
    choices.given.update((arg, known[value]) for arg, value in read)
    evaluate_module(alone, operands, {}, observer=choices.observe)
    at = op.results.index(op.ids)
    return tuple(evaluate_module(alone, operands, {}, override=choices.held_to(call.results[at], ours[at])))


def _params(op: Layer | Route | RouteGroup) -> Sequence[Value]:
    """What the router of an op takes beside the logits."""
    return op.router_params if isinstance(op, Layer) else op.params
