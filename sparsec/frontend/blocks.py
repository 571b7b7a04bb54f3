"""Operators of a model without its weights: run on fake tensors, repeated blocks once, what cannot run block by block.

Where `sparsec.frontend.capture` needs a program that `torch.export` accepts as a whole, `record` needs only shapes: it
runs the model's Python on fake tensors and notes every operator. Two things keep that short and sturdy:

- Members of a `ModuleList`, `ModuleDict` or `Sequential` that are built alike are one `Family`. Its first member runs;
  the others return tensors shaped like its results.
- A module whose Python needs values (a loop over the experts that were hit) stops alone: what it noted stays, its
  result is taken to be shaped like its first floating-point argument, and the model goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Progress = Callable[[str], None]
"""Called with the path of each module as it starts."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_NEEDS_VALUES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)
_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True, eq=False)
class Family:
    """Modules of one container that are built alike.

    Args:
        container: path of the container, `model.layers`.
        members: paths of the members, in order.
    """

    container: str
    members: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.members)


@dataclass(eq=False)
class Value:
    """A tensor that an operator read or made; `shape` holds None where a size depends on data."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype
    param: str = ""  #: path of the parameter that it is
    input: bool = False  #: whether the caller gave it
    stored: int | None = None  #: bytes that it takes, where shape and dtype do not tell

    @property
    def nbytes(self) -> int:
        """Bytes that it takes; 0 where its size depends on data."""
        return (self.numel or 0) * self.dtype.itemsize if self.stored is None else self.stored

    @property
    def numel(self) -> int | None:
        """Number of elements; None where it depends on data."""
        total = 1
        for size in self.shape:
            if size is None:
                return None
            total *= size
        return total


@dataclass(eq=False)
class Call:
    """One operator, or one whole module under the names `block` (a family's member) and `stopped`.

    `args` and `kwargs` are the operator's own, with a Value in place of each tensor.
    """

    name: str
    scope: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Value, ...]
    is_view: bool = False
    family: Family | None = None

    @property
    def operands(self) -> list[Value]:
        """Every tensor read, in order."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Value)]


@dataclass(eq=False)
class Record:
    """What `record` saw.

    Args:
        calls: operators in order, those of a family's first member standing for all.
        families: those of every container, lone members included.
        parameters: each parameter once, by its first path.
        stopped: for each module that could not run on shapes alone, the reason.
        returned: tensors that the model hands back, in any object it returns.
        tokens: of the first input: elements of ids, rows of features.
        batch: leading size of the first input.
    """

    calls: list[Call] = field(default_factory=list[Call])
    families: list[Family] = field(default_factory=list[Family])
    parameters: dict[str, Value] = field(default_factory=dict[str, Value])
    stopped: dict[str, str] = field(default_factory=dict[str, str])
    returned: set[Value] = field(default_factory=set[Value])
    tokens: int = 1
    batch: int = 1

    @cached_property
    def family_of(self) -> dict[str, Family]:
        """The family of each member, by path."""
        return {path: family for family in self.families for path in family.members}

    def canonical(self, path: str) -> str:
        """The path with every member replaced by the first of its family, from the outside in."""
        done = ""
        for part in path.split("."):
            done = _join(done, part)
            family = self.family_of.get(done)
            done = family.members[0] if family else done
        return done

    def around(self, path: str) -> list[Family]:
        """Families that the module at `path` is in, from the outside in."""
        parts = path.split(".")
        prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return [self.family_of[prefix] for prefix in prefixes if prefix in self.family_of]


def families(model: nn.Module) -> list[Family]:
    """Group the members of each container by how they are built: classes, parameters, buffers, plain attributes.

    An attribute that counts along with the member's position, such as a layer's index, makes no difference.
    """
    found = list[Family]()
    for path, module in model.named_modules():
        if not isinstance(module, _CONTAINERS):
            continue
        members = list(module.named_children())
        described = [_describe(member) for _, member in members]
        kinds = dict[Any, list[str]]()
        counting = _counting(described)
        for (name, _), (shape, scalars) in zip(members, described, strict=True):
            rest = tuple(item for item in scalars.items() if (shape, item[0]) not in counting)
            kinds.setdefault((shape, rest), []).append(_join(path, name))
        found += [Family(path, tuple(kind)) for kind in kinds.values()]
    return found


def _describe(module: nn.Module) -> tuple[Any, dict[str, Any]]:
    """Classes and tensors of a subtree, and its plain attributes by path."""
    shape, scalars = list[Any](), dict[str, Any]()
    for path, part in module.named_modules():
        tensors = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        shape.append((path, type(part), tuple((name, tuple(t.shape), t.dtype) for name, t in tensors)))
        for name, value in vars(part).items():
            if isinstance(value, _SCALARS) and not name.startswith("_"):
                scalars[_join(path, name)] = value
            elif callable(value) and not isinstance(value, nn.Module):
                scalars[_join(path, name)] = getattr(value, "__qualname__", type(value))
    return tuple(shape), scalars


def _counting(described: list[tuple[Any, dict[str, Any]]]) -> set[tuple[Any, str]]:
    """Attributes that differ from the member's position by a constant, in every member of one shape."""
    offsets = dict[tuple[Any, str], set[Any]]()
    for position, (shape, scalars) in enumerate(described):
        for path, value in scalars.items():
            number = isinstance(value, int) and not isinstance(value, bool)
            offsets.setdefault((shape, path), set()).add(value - position if number else None)
    return {key for key, values in offsets.items() if len(values) == 1 and None not in values}


def record(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    progress: Progress | None = None,
) -> Record:
    """Run `model` on the shapes of the inputs and note its operators.

    Args:
        model: weights may lie on the meta device; they are not read and nothing is changed.
        args, kwargs: inputs; only shapes and dtypes of tensors matter.
        progress: told the path of each block as it starts.

    Raises:
        Exception: what the model itself raises, where not even a part of it can be run.
    """
    return _Recorder(model, progress).run(args, dict(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Notes what passes through the dispatcher, above a FakeTensorMode that computes the shapes."""

    def __init__(self, model: nn.Module, progress: Progress | None) -> None:
        super().__init__()
        self.model, self.progress = model, progress or (lambda path: None)
        self.record = Record(families=families(model))
        self.scopes = [""]
        self.values = dict[int, Value]()
        self.alive = list[Tensor]()  # fake tensors take no memory, but a freed one would hand its id to another
        self.base = dict[int, Tensor]()
        self.outputs = dict[Family, Any]()
        self.paused = False
        self._name_parameters()

    def _name_parameters(self) -> None:
        for path, parameter in self.model.named_parameters():
            value = Value(_sizes(parameter), parameter.dtype, param=path)
            self.record.parameters[path] = self._bind(parameter, value)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Record:
        fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_as_if_exporting())
            stack.enter_context(fake)

            def enter(tensor: Tensor) -> Tensor:
                inner = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                self._bind(inner, Value(_sizes(inner), inner.dtype, input=True))
                return inner

            args, kwargs = tree_map_only(Tensor, enter, (args, kwargs))
            self._measure()
            stack.enter_context(self._watched())
            stack.enter_context(self)
            output = self._run("", self.model, args, kwargs)
        self.record.returned = {self.values[id(t)] for t in _tensors(output) if id(t) in self.values}
        return self.record

    def _measure(self) -> None:
        first = next((value for value in self.values.values() if value.input), None)
        if first is not None and first.shape:
            sizes = first.shape[:-1] if first.dtype.is_floating_point else first.shape
            self.record.tokens, self.record.batch = prod(size or 1 for size in sizes), first.shape[0] or 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if self.paused or not made or func.namespace == "prim":
            return out
        read_args, read_kwargs = tree_map_only(Tensor, self._value, (args, kwargs))
        mutated = [arg for arg in tree_leaves((args, kwargs)) if any(arg is result for result in made)]
        results = tuple(self._bind(tensor, Value(_sizes(tensor), tensor.dtype)) for tensor in made)
        name = str(func.overloadpacket).replace("::", ".")
        self._note(name, read_args, read_kwargs, results, is_view=func.is_view)
        if func.is_view:
            source = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.base |= {id(tensor): source for tensor in made}
        for tensor in mutated:
            self._written(tensor)
        return out

    def _written(self, tensor: Tensor) -> None:
        """A write through a view is a write to what it views."""
        value, viewed = self._value(tensor), self.base.get(id(tensor))
        while viewed is not None:
            old = self._value(viewed)
            if not old.param:
                self._note("written", (old, value), {}, (self._bind(viewed, Value(old.shape, old.dtype)),))
            viewed = self.base.get(id(viewed))

    def _note(self, name: str, args: Any, kwargs: Any, results: tuple[Value, ...], **more: Any) -> None:
        self.record.calls.append(Call(name, self.scopes[-1], tuple(args), kwargs, results, **more))

    def _bind(self, tensor: Tensor, value: Value) -> Value:
        self.alive.append(tensor)
        self.values[id(tensor)] = value
        return value

    def _value(self, tensor: Tensor) -> Value:
        return self.values.get(id(tensor)) or self._bind(tensor, Value(_sizes(tensor), tensor.dtype))

    @contextmanager
    def _watched(self) -> Generator[None]:
        """Every module's `forward` passes through `_call`; the model is in evaluation mode."""
        changed = list[tuple[nn.Module, Any]]()
        training = [module for module in self.model.modules() if module.training]
        try:
            self.model.eval()
            for path, module in self.model.named_modules():
                if not path:
                    continue
                changed.append((module, vars(module).get("forward")))
                module.forward = self._wrap(path, module.forward)
            yield
        finally:
            for module, own in changed:
                del module.forward
                if own is not None:
                    module.forward = own
            for module in training:
                module.training = True

    def _wrap(self, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            return self._call(path, forward, args, kwargs)

        return watched

    def _call(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        family = self.record.family_of.get(path)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        static = not any(isinstance(size, torch.SymInt) for tensor in inputs for size in tensor.shape)
        if family is None or family not in self.outputs or not static:
            if family is not None:
                self.progress(path)
            output = self._run(path, forward, args, kwargs)
            if family is not None and static:
                self.outputs[family] = output
        else:
            output = self.outputs[family]
        if family is None:
            return output
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        fresh = {id(tensor): self._like(tensor) for tensor in made}
        results = tuple(self._value(fresh[id(tensor)]) for tensor in made)
        inner = tuple(self._value(tensor) for tensor in made)
        self.scopes.append(path)
        self._note("block", tuple(self._value(tensor) for tensor in inputs), {"inner": inner}, results, family=family)
        self.scopes.pop()
        return tree_map_only(Tensor, lambda tensor: fresh[id(tensor)], output)

    def _run(self, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.scopes.append(path)
        try:
            return forward(*args, **kwargs)
        except Exception as error:  # whatever the model's Python makes of a tensor without values
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            like = next((tensor for tensor in inputs if tensor.dtype.is_floating_point), None)
            if like is None or (not path and not isinstance(error, _NEEDS_VALUES)):
                raise
            self.record.stopped[path] = _reason(error)
            output = self._like(like)
            read = tuple(self._value(tensor) for tensor in inputs)
            self._note("stopped", read, {}, (self._value(output),))
            return output
        finally:
            self.scopes.pop()

    def _like(self, tensor: Tensor) -> Tensor:
        self.paused = True
        try:
            copy = torch.empty_like(tensor)
        finally:
            self.paused = False
        self._bind(copy, Value(_sizes(copy), copy.dtype))
        return copy


def _reason(error: Exception) -> str:
    """In a few words, why a module stopped."""
    if isinstance(error, _NEEDS_VALUES):
        return "its Python depends on values of tensors"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _as_if_exporting() -> Generator[None]:
    """Libraries that ask `torch.compiler.is_exporting()` take the path without data-dependent shortcuts."""
    flags = ("_is_compiling_flag", "_is_exporting_flag")
    log = logging.getLogger("torch._subclasses.fake_tensor")  # reports what `_run` handles
    level = log.level
    before = {flag: getattr(torch.compiler, flag) for flag in flags if hasattr(torch.compiler, flag)}
    try:
        for flag in before:
            setattr(torch.compiler, flag, True)
        log.setLevel(logging.CRITICAL)
        yield
    finally:
        log.setLevel(level)
        for flag, value in before.items():
            setattr(torch.compiler, flag, value)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _sizes(tensor: Tensor) -> tuple[int | None, ...]:
    return tuple(None if isinstance(size, torch.SymInt) else size for size in tensor.shape)


def _tensors(item: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Tensors in nested containers and objects, such as a cache with its layers."""
    seen = set() if seen is None else seen
    if isinstance(item, Tensor):
        yield item
    elif id(item) not in seen and not isinstance(item, (nn.Module, type, *_SCALARS)):
        seen.add(id(item))
        inner = item.values() if isinstance(item, Mapping) else item if isinstance(item, (list, tuple, set)) else ()
        for part in (*inner, *getattr(item, "__dict__", {}).values()):
            yield from _tensors(part, seen)
