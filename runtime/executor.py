"""Runs a plan."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsec.runtime import structure
from sparsec.runtime.backends import bind
from sparsec.runtime.banks import bank_slots
from sparsec.runtime.check import check_plan
from sparsec.runtime.context import Choice, Context
from sparsec.runtime.dims import Expr, compile_dim
from sparsec.runtime.dtypes import DTYPES, NAMES
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.exchanges import Idle, exchange, require_world
from sparsec.runtime.operators import resolve, slots_of, updates
from sparsec.runtime.plan import Arg, Call, Exchange, Free, Launch, Plan
from sparsec.runtime.steps import Closure, Runner, Slots
from sparsec.runtime.tables import Tables, as_tables, check_tables

if TYPE_CHECKING:
    from sparsec.runtime.distributed import World


class Program:
    """A plan with its weights, ready to run.

    Buffers that the plan updates (a KV cache) belong to the program: they are copied from `weights`, and one call sees
    what the last one left. A program is therefore to be used by one thread at a time.

    Args:
        plan: what to run; checked here, whoever made it.
        weights: source name -> tensor, for every parameter, buffer and constant. Read once, one at a time, and expert
            banks are let go of as soon as they are packed, so a mapping that loads tensors on demand saves memory.
        device: where to run.
        files: files beside the plan that its kernels need (GPU binaries), by relative name.
        allow: namespaces or operators beyond aten's that the plan may call (`["mylib"]`).
        trust_code: run the plan's native kernels even if they were not compiled by this user on this machine; without
            it those that were not are run by PyTorch.
        world: the ranks that run a plan which was compiled for several devices; by default all processes that
            torch.distributed knows. Ranks run together: each calls the program for inputs of its own, as often as it
            has some, and then `finish`.

    Raises:
        ArtifactError: the plan cannot be run, or does not fit the weights or the world.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, Tensor],
        device: str | torch.device = "cpu",
        *,
        files: Mapping[str, bytes] | None = None,
        allow: Collection[str] = (),
        trust_code: bool = False,
        world: World | None = None,
    ) -> None:
        check_plan(plan, allow)
        self.plan, self.device = plan, _placed(device)
        self.world = require_world(plan, world)
        self._inputs = [arg for arg in plan.args if arg.kind == "input"]
        self._specs = [_Spec(arg) for arg in self._inputs]
        self._weights, self._by_slot = weights, {arg.slot: arg for arg in plan.args if arg.kind != "input"}
        self._context = Context(self.device, files or {}, self._constant, trust_code=trust_code)
        with torch.inference_mode():
            symbols = {symbol for spec in self._specs for symbol in spec.symbols}
            self._runner = Runner(plan.steps, _width(plan), symbols, self.device, self._launch, allow)
            banks = bank_slots(plan, [name for name, path in self.paths.items() if path.isa is not None])
            for slot, arg in self._by_slot.items():
                if slot not in banks:
                    self._runner.base[slot] = self._load(arg)
            self._set_up_buffers(allow)
            check_tables(plan, self._runner.base)
        del self._weights  # from here on only what the steps read is held

    @property
    def paths(self) -> Mapping[str, Choice]:
        """Who runs the kernels that come as native code, and why, by their names."""
        return self._context.paths

    def __call__(self, *inputs: Any) -> list[Tensor]:
        """Run on a flat list of inputs: tensors, and integers where the model takes them.

        Returns: the outputs, flat, in the order of the model.

        Raises:
            InputError: an input has the wrong type, dtype, rank, size or device.
        """
        with torch.inference_mode():
            env = self._bind(inputs)
            if self.world is not None:
                self._meet(self.world, True)
            values = self._runner.start(env)
            for arg, value in zip(self._inputs, inputs, strict=True):
                values[arg.slot] = value
            try:
                self._runner.run(values)
            except RuntimeError as error:
                if 0 in env.values():
                    empty = min(name for name, size in env.items() if size == 0)
                    raise InputError(f"the program cannot run on an empty input ({empty} = 0): {error}") from error
                raise
            return self._finish(values)

    def call(self, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run on arguments as the model itself takes them, and put the results together as the model does.

        Raises: InputError, also where the arguments have another structure than the ones it was compiled for.
        """
        outputs = self(*structure.take_apart(self.plan.inputs, args, kwargs or {}))
        return structure.build(self.plan.structure, outputs)

    def finish(self) -> None:
        """Take part in what other ranks still run, until all of them have called this too.

        A program that runs alone has nothing to wait for. Raises: RankError.
        """
        if self.world is not None:
            with torch.inference_mode():
                while self._meet(self.world, False):
                    self._idle()

    def replan(self, placement: str | os.PathLike[str] | Tables, *, budget_bytes: int | None = None) -> Iterator[str]:
        """Go over to another placement of the experts, in steps between which the program may run as ever.

        Every rank must call this at the same point between two runs, and take each step at the same point too: a step
        is taken when the result is asked for the next item. `for _ in program.replan("plan.json"): pass` takes all.

        Args:
            placement: a plan.json for as many ranks and slots, or per layer its slots [P] and shares [P].
            budget_bytes: the most that a rank sends or receives in a step; None: no limit.

        Yields: the layer of each step that was done.

        Raises:
            InputError: the program runs alone, the placement is none for it, or ranks were given different ones.
            RankError: another rank is dead or does not answer.
        """
        if self.world is None or self.plan.spread is None:
            raise InputError("the program was compiled for one device: its experts have no other place to go to")
        from sparsec.runtime.replan import replan

        tables = as_tables(placement, self.plan.spread)
        return replan(self.plan, self._runner.base, self._context, self.world, tables, budget_bytes)

    def _meet(self, world: World, active: bool) -> bool:
        """Whether any rank has something to run; all ranks ask before each run."""
        return bool(world.gather(torch.tensor([active], dtype=torch.int64, device=self.device)).any())

    @cached_property
    def _idle(self) -> Idle:
        return Idle(self.plan, self._runner, self.device)

    def reset(self) -> None:
        """Set every buffer back to what it was when the program was loaded."""
        with torch.inference_mode():
            for buffer, first in self._initial:
                if first is None:
                    buffer.zero_()
                else:
                    buffer.copy_(first)

    def _bind(self, inputs: Sequence[Any]) -> dict[str, int]:
        """Check inputs and return what their shapes make of the symbols."""
        if len(inputs) != len(self._specs):
            names = ", ".join(arg.name for arg in self._inputs)
            raise InputError(f"the program takes {len(self._specs)} inputs ({names}), {len(inputs)} were given")
        env = dict[str, int]()
        for spec, value in zip(self._specs, inputs, strict=True):
            spec.bind(value, env, self.device)
        for spec, value in zip(self._specs, inputs, strict=True):
            spec.check(value, env)
        return env

    def _finish(self, values: Slots) -> list[Tensor]:
        outputs = [values[output.slot] for output in self.plan.outputs if output.kind == "output"]
        if self._initial:
            # What the caller gets must not change under him at the next call.
            owned = {buffer.untyped_storage().data_ptr() for buffer, _ in self._initial}
            outputs = [
                value.clone() if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in owned else value
                for value in outputs
            ]
            for slot, buffer in self._updates:
                value = values[slot]
                if value.data_ptr() != buffer.data_ptr() or value.shape != buffer.shape:
                    buffer.copy_(value)
        return outputs

    def _set_up_buffers(self, allow: Collection[str]) -> None:
        """Copy the buffers that steps or outputs change, and remember what they were."""
        buffers = {arg.source: arg for arg in self.plan.args if arg.kind == "buffer"}
        slots = {source: arg.slot for source, arg in buffers.items()}
        changed = {output.source for output in self.plan.outputs if output.kind == "mutation"}
        for step in self.plan.steps:
            if isinstance(step, Call) and updates(resolve(step.op, allow)):
                changed |= {source for source, slot in slots.items() if slot in slots_of(step.args[0])}
        base = self._runner.base
        self._initial: list[tuple[Tensor, Tensor | None]] = []
        for source in sorted(changed):
            first = base[slots[source]]
            if buffers[source].zeros:  # made for this program: nobody else has it
                self._initial.append((first, None))
                continue
            buffer = base[slots[source]] = first.clone(memory_format=torch.contiguous_format)
            self._initial.append((buffer, first if bool(first.any()) else None))
        mutations = [output for output in self.plan.outputs if output.kind == "mutation"]
        self._updates = [(output.slot, base[slots[output.source]]) for output in mutations]

    def _launch(self, step: Launch | Exchange) -> Closure:
        """The closure of a launch or of an exchange."""
        if isinstance(step, Exchange):
            assert self.world is not None
            return exchange(step, self.world)
        ins, outs = step.ins, step.outs
        kernel = bind(self.plan.kernels[step.kernel], ins, self._context)

        def launch(values: Slots) -> None:
            results = kernel([None if slot is None else values[slot] for slot in ins])
            for slot, result in zip(outs, results, strict=True):
                values[slot] = result

        return launch

    def _constant(self, slot: int) -> Tensor | None:
        arg = self._by_slot.get(slot)
        return self._load(arg) if arg is not None and arg.kind != "buffer" else None

    def _load(self, arg: Arg) -> Tensor:
        """A parameter, buffer or constant, on the device. Raises: ArtifactError if the weights do not fit the plan."""
        if arg.zeros and arg.type is not None:
            shape = [int(dim) for dim in arg.type.shape]
            try:
                return torch.zeros(shape, dtype=DTYPES[arg.type.dtype], device=self.device)
            except RuntimeError:
                raise ArtifactError(f"there is no memory for the buffer '{arg.source}' of shape {shape}") from None
        try:
            tensor = self._weights[arg.source]
        except KeyError:
            raise ArtifactError(f"the weights lack '{arg.source}', which the plan reads") from None
        assert arg.type is not None
        if list(tensor.shape) != list(arg.type.shape) or tensor.dtype != DTYPES[arg.type.dtype]:
            given = f"{list(tensor.shape)} {NAMES.get(tensor.dtype, tensor.dtype)}"
            raise ArtifactError(
                f"'{arg.source}' is {given} in the weights, {list(arg.type.shape)} {arg.type.dtype} in the plan"
            )
        return tensor.detach().to(self.device)


class _Spec:
    """What one input must be."""

    def __init__(self, arg: Arg) -> None:
        self.arg = arg
        self.dtype = None if arg.type is None else DTYPES[arg.type.dtype]
        dims = () if arg.type is None else [compile_dim(dim) for dim in arg.type.shape]
        self.rank = len(dims)
        self.fixed = [(axis, dim) for axis, dim in enumerate(dims) if isinstance(dim, int)]
        exprs = [(axis, dim) for axis, dim in enumerate(dims) if isinstance(dim, Expr)]
        self.bare = [(axis, expr.text) for axis, expr in exprs if expr.text.isidentifier()]
        self.derived = [(axis, expr) for axis, expr in exprs if not expr.text.isidentifier()]
        self.symbols = [symbol for _, symbol in self.bare] if arg.type is not None else [arg.symbol]

    def bind(self, value: Any, env: dict[str, int], device: torch.device) -> None:
        """Check what does not depend on other inputs and give symbols their values."""
        if self.dtype is None:
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"input '{self.arg.name}' is {type(value).__name__}, an integer is needed")
            self._give(self.arg.symbol, value, env, "value")
            return
        if not isinstance(value, Tensor):
            raise InputError(f"input '{self.arg.name}' is {type(value).__name__}, a tensor is needed")
        if value.dtype != self.dtype:
            raise InputError(f"input '{self.arg.name}' has dtype {value.dtype}, the program takes {self.dtype}")
        if value.device != device:
            raise InputError(f"input '{self.arg.name}' is on {value.device}, the program runs on {device}")
        shape = value.shape
        if len(shape) != self.rank:
            raise InputError(f"input '{self.arg.name}' has shape {list(shape)}, the program takes {self._spelled()}")
        for axis, size in self.fixed:
            if shape[axis] != size:
                raise InputError(
                    f"input '{self.arg.name}' has shape {list(shape)}, the program takes {self._spelled()}: "
                    f"axis {axis} must be {size}"
                )
        for axis, symbol in self.bare:
            self._give(symbol, shape[axis], env, f"axis {axis}")

    def check(self, value: Any, env: dict[str, int]) -> None:
        """Check the sizes that follow from symbols, which all have values by now."""
        for axis, expr in self.derived:
            if value.shape[axis] != expr(env):
                raise InputError(
                    f"input '{self.arg.name}' has size {value.shape[axis]} in axis {axis}, "
                    f"{expr.text} = {expr(env)} is needed"
                )

    def _give(self, symbol: str, size: int, env: dict[str, int], what: str) -> None:
        if env.setdefault(symbol, size) != size:
            raise InputError(
                f"input '{self.arg.name}' has {size} as its {what}, another input makes {symbol} = {env[symbol]}"
            )

    def _spelled(self) -> str:
        assert self.arg.type is not None
        return f"[{', '.join(map(str, self.arg.type.shape))}]"


def _placed(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if str(device) == "cuda":  # tensors say which one they are on
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _width(plan: Plan) -> int:
    slots = [arg.slot for arg in plan.args]
    for step in plan.steps:
        if not isinstance(step, Free):
            slots += [slot for slot in step.outs if slot is not None]
    return max(slots, default=-1) + 1
