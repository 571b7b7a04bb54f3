"""Blocks of experts that a model repeats, exported once each and called: a loop over 128 experts in 48 layers is
traced once, not 48 times.

    with repeated.blocks(model, args, kwargs) as blocks:
        program = torch.export.export(model, args, kwargs, ...)  # holds one `sparsec::block` for each of their calls

A block is the innermost module that holds a bank (a `ModuleList` of like modules, or parameters stacked in three
dimensions) and that the model has more than once. Two blocks are one where classes, tensors, and the values of every
attribute that the code of the first read while it was traced are the same, so that a layer's index, which nothing
reads, makes no difference. What cannot be kept apart so (sizes that the block's code fixes, buffers that it changes,
results that are its inputs) is traced in its place, as if there were no blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sparsec.dialects.dtypes import to_torch
from sparsec.ir.core import Func
from sparsec.ir.types import TensorType, evaluate, symbols

_BANK = 4  # members of the least bank that is looked for
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_PLUMBING = frozenset(vars(nn.Module()))  # attributes of every module: parameters, children, hooks

Export = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[ExportedProgram, Func, dict[str, Tensor]]]
"""Exports a module for open sizes: the program, its function in the IR, and the tensor of each argument's source."""


class Unrepeatable(Exception):
    """A block that has to be traced in its place."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One traced block, which its like call.

    Args:
        name: of the function.
        func: its body; inputs come first among the arguments, then parameters, buffers and constants.
        path: of the module that was traced.
        sources: for each argument after the inputs, the parameter's or buffer's path within the block, or a constant.
        constants: tensors that the code makes.
        inputs: what it was called with: leaves that are no tensors by value.
        in_spec, out_spec: how arguments and results are put together.
        results: for each leaf of the result, None for a tensor, or the constant that it is, in a tuple.
    """

    name: str
    func: Func
    path: str
    sources: tuple[str, ...]
    constants: dict[str, Tensor]
    inputs: tuple[Any, ...]
    in_spec: TreeSpec
    out_spec: TreeSpec
    results: tuple[tuple[Any] | None, ...]

    def sizes(self, leaves: list[Any], spec: TreeSpec) -> dict[str, Any] | None:
        """The size of each symbol of the block in a call with `leaves`; None for a call that is not of its kind."""
        if spec != self.in_spec:
            return None
        env: dict[str, Any] = {}
        args = iter(self.func.body.args)
        for example, given in zip(self.inputs, leaves, strict=True):
            if not isinstance(example, Tensor):
                if isinstance(given, torch.SymInt) or not _same(example, given):
                    return None
                continue
            wanted = next(args).tensor
            if not isinstance(given, Tensor) or given.dtype != example.dtype or given.dim() != wanted.rank:
                return None
            if given.device != example.device:
                return None
            for dim, size in zip(wanted.shape, given.shape, strict=True):
                known = dim if isinstance(dim, int) else env.setdefault(dim, size)
                lone = known is not dim and type(size) is int and size < 2  # tracing takes open sizes for two or more
                if lone or not statically_known_true(known == size):
                    return None
        return env

    def like(self, tensors: list[Tensor], env: Mapping[str, Any]) -> list[Tensor]:
        """Tensors (fake where `tensors` are) of the types of the results."""
        types = [type for type in self.func.result_types if isinstance(type, TensorType)]
        return [
            torch.empty(
                [evaluate(dim, env) for dim in type.shape], dtype=to_torch(type.dtype), device=tensors[0].device
            )
            for type in types
        ]

    def call(self, path: str, leaves: list[Any]) -> Any:
        """The call of this block by the module at `path`, as one operator."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        results = iter(torch.ops.sparsec.block(tensors, self.name, path))
        return tree_unflatten([next(results) if one is None else one[0] for one in self.results], self.out_spec)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a model by name, and by path the parameters and buffers of each module that one stands for."""

    by_name: dict[str, Block] = dataclasses.field(default_factory=dict[str, Block])
    weights: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict[str, dict[str, Tensor]])

    def __bool__(self) -> bool:
        return bool(self.by_name)


_active: dict[str, Block] = {}

_library = torch.library.Library("sparsec", "FRAGMENT")
_library.define("block(Tensor[] inputs, str name, str path) -> Tensor[]")


def _fake(inputs: list[Tensor], name: str, path: str) -> list[Tensor]:
    block = _active[name]
    env: dict[str, Any] = {}
    for arg, given in zip(block.func.body.args, inputs, strict=False):
        for dim, size in zip(arg.tensor.shape, given.shape, strict=True):
            env.setdefault(str(dim), size)
    return block.like(inputs, env)


torch.library.register_fake("sparsec::block", _fake, lib=_library)

TARGET = torch.ops.sparsec.block.default
"""A call of a block, as it stands in a graph: inputs, the block's name, the path of the module, whose weights it reads.

It is never run.
"""


@contextmanager
def blocks(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], export: Export
) -> Generator[Blocks, None, None]:
    """For a while, let blocks that `model` repeats be one operator each in graphs that are traced from it.

    Yields: the blocks; none where the model repeats none, or where one cannot be kept apart.
    """
    found = candidates(model)
    tracer = _Tracer(found, export)
    if found:
        try:
            tracer.trace(model, args, kwargs)
        except Exception:  # the model's code, which fails again, and is explained, where it is exported as a whole
            tracer.blocks.clear()
    weights = {path: _weights(module) for path, module in found.items()} if tracer.blocks else {}
    with ExitStack() as stack:
        if tracer.blocks:
            _active.update(tracer.blocks)
            stack.callback(_active.clear)
            stack.enter_context(_without_weights(found))
            stack.enter_context(_forwards(found, tracer.replay))
        yield Blocks(tracer.blocks, weights)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    parameters, buffers = module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)
    return dict(parameters) | dict(buffers)


# --------------------------------------------------------------------------------------------------------- candidates
def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """The innermost modules that hold a bank and have their like elsewhere in the model, by path."""
    holders = {path: module for path, module in model.named_modules() if path and holds_bank(module)}
    kinds: dict[Any, list[str]] = {}
    for path, module in holders.items():
        kinds.setdefault(_described(module), []).append(path)
    repeated = {path for paths in kinds.values() if len(paths) > 1 for path in paths}
    outer = {path for path in repeated if any(other.startswith(f"{path}.") for other in repeated)}
    return {path: holders[path] for path in holders if path in repeated - outer}


def holds_bank(module: nn.Module) -> bool:
    """Whether a module's own code goes over experts: a list of like modules, or stacked weights, are its own.

    Banks of transformers' interface and modules with a method that an adapter replaces are one operator already.
    """
    if "forward" in vars(module) or any(
        hasattr(part, "_apply_gate") or "forward" in vars(part) for part in module.modules()
    ):
        return False
    stacked = [parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    if any(stacked.count(size) >= 2 and size >= _BANK for size in stacked):
        return True
    return any(
        isinstance(child, nn.ModuleList | nn.ModuleDict)
        and len(child) >= _BANK
        and next(child.parameters(), None) is not None
        and len({_described(member) for member in child.children()}) == 1
        for child in module.children()
    )


def _described(module: nn.Module) -> Any:
    """Classes and tensors of a module and its parts; equal descriptions are hashable and equal."""
    numbers: dict[int, int] = {}
    return tuple(
        (
            path,
            type(part),
            part.training,
            tuple(id(hook) for hooks in (part._forward_hooks, part._forward_pre_hooks) for hook in hooks.values()),
            tuple(
                (name, tuple(t.shape), t.dtype, t.device, numbers.setdefault(id(t), len(numbers)))
                for name, t in (*part._parameters.items(), *part._buffers.items())
                if t is not None
            ),
        )
        for path, part in module.named_modules()
    )


# ------------------------------------------------------------------------------------------------------------- tracing
class _Tracer:
    """Runs the model once on fake tensors and exports the first block of each kind as it comes by."""

    def __init__(self, found: dict[str, nn.Module], export: Export) -> None:
        self.export = export
        self.paths = {module: path for path, module in found.items()}
        self.kinds = {module: _described(module) for module in found.values()}
        self.blocks: dict[str, Block] = {}
        self.traced: dict[Any, list[tuple[Block, dict[tuple[str, str], Any]]]] = {}  # with what its code read
        self.used: dict[nn.Module, list[Block]] = {}

    def trace(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
        leaves, spec = tree_flatten((args, kwargs))
        found = {path: module for module, path in self.paths.items()}
        with mode, _forwards(found, self.visit):
            fake = [mode.from_tensor(leaf, static_shapes=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            fake_args, fake_kwargs = tree_unflatten(fake, spec)
            model(*fake_args, **fake_kwargs)

    def replay(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block's forward does while the model is exported."""
        leaves, spec = tree_flatten((args, kwargs))
        for block in self.used[module]:
            if block.sizes(leaves, spec) is not None:
                return block.call(self.paths[module], leaves)
        raise Unrepeatable("the model calls a block with other sizes than it did at first")

    def visit(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a block's forward does while the kinds of blocks are collected."""
        leaves, spec = tree_flatten((args, kwargs))
        for block, read in self.traced.setdefault(self.kinds[module], []):
            env = block.sizes(leaves, spec)
            if env is not None and all(_same(value, _read(module, *place)) for place, value in read.items()):
                break
        else:
            block, read = self.make(module, leaves, spec)
            self.traced[self.kinds[module]].append((block, read))
            self.blocks[block.name] = block
            env = block.sizes(leaves, spec)
        if env is None:
            raise Unrepeatable("the block takes no sizes like those of this call")
        self.used.setdefault(module, []).append(block)
        results = iter(block.like([leaf for leaf in leaves if isinstance(leaf, Tensor)], env))
        return tree_unflatten([next(results) if one is None else one[0] for one in block.results], block.out_spec)

    def make(self, module: nn.Module, leaves: list[Any], spec: TreeSpec) -> tuple[Block, dict[tuple[str, str], Any]]:
        """Export one block. Raises: Unrepeatable, and what the export raises."""
        with unset_fake_temporarily():
            real = [_zeros(leaf) for leaf in leaves]
            args, kwargs = tree_unflatten(real, spec)
            kept = {path: dict(vars(part)) for path, part in module.named_modules()}
            with _reads(module) as places:
                program, func, tensors = self.export(module, args, kwargs)
            if any(vars(part).keys() != kept[path].keys() for path, part in module.named_modules()):
                raise Unrepeatable("the block's code keeps something for later")
            read = {place: _read(module, *place) for place in sorted(places)}
            if any(value is not kept[path][name] for (path, name), value in read.items()):
                raise Unrepeatable("the block's code changes its attributes")
            return _block(f"block_{len(self.blocks)}", self.paths[module], program, func, tensors, real, spec), read


def _block(
    name: str,
    path: str,
    program: ExportedProgram,
    func: Func,
    tensors: dict[str, Tensor],
    leaves: list[Any],
    spec: TreeSpec,
) -> Block:
    signature, out_spec = program.graph_signature, program.call_spec.out_spec
    attrs = [func.arg_attrs[arg] for arg in func.body.args]
    bound = {str(dim) for arg in func.body.args for dim in arg.tensor.shape}
    if any(attrs.get("kind") == "mutation" for attrs in func.result_attrs.values()):
        raise Unrepeatable("the block changes a buffer")
    if any(value in func.body.args for value in func.body.terminator.operands):
        raise Unrepeatable("the block returns an input")
    for type in func.result_types:
        if not isinstance(type, TensorType) or {s for dim in type.shape for s in symbols(dim)} - bound:
            raise Unrepeatable(f"the block returns a {type}, whose size depends on data")
    for limits in program.range_constraints.values():
        if int(limits.lower) > 2 or limits.upper < 2**31:
            raise Unrepeatable("the block's code limits sizes")
    sources = tuple(str(one["source"]) for one in attrs if one["kind"] != "input")
    constants = {str(one["source"]): tensors[str(one["source"])] for one in attrs if one["kind"] == "constant"}
    for op in func.body.walk():
        op.loc = op.loc.within(path)
    func.name = name
    func.arg_attrs, func.result_attrs, func.attrs = {}, {}, {"scope": path}
    results = tuple(
        (one.arg.value,) if isinstance(one.arg, ConstantArgument) else None for one in signature.output_specs
    )
    assert out_spec is not None
    return Block(name, func, path, sources, constants, tuple(leaves), spec, out_spec, results)


@contextmanager
def _forwards(found: Mapping[str, nn.Module], call: Callable[..., Any]) -> Generator[None, None, None]:
    """Let `call(module, args, kwargs)` stand for the forward of modules; within it, their own forward is back."""

    def replace(module: nn.Module) -> None:
        def forward(*args: Any, **kwargs: Any) -> Any:
            del module.forward
            try:
                return call(module, args, kwargs)
            finally:
                module.__dict__["forward"] = forward

        module.__dict__["forward"] = forward

    for module in found.values():
        replace(module)
    try:
        yield
    finally:
        for module in found.values():
            module.__dict__.pop("forward", None)


@contextmanager
def _without_weights(found: Mapping[str, nn.Module]) -> Generator[None, None, None]:
    """Take parameters, buffers and parts out of modules: torch.export makes an argument of each, needed or not."""
    held = [(module, name, getattr(module, name)) for module in found.values() for name in _HELD]
    for module, name, _ in held:
        module.__dict__[name] = {}
    try:
        yield
    finally:
        for module, name, content in held:
            module.__dict__[name] = content


_HELD = ("_parameters", "_buffers", "_modules")


# ---------------------------------------------------------------------------------------------------------- attributes
@contextmanager
def _reads(module: nn.Module) -> Generator[set[tuple[str, str]], None, None]:
    """The (path, name) of every attribute of a module's or its parts' own that code reads in the meantime."""
    seen: set[tuple[str, str]] = set()
    classes = [(part, type(part)) for part in dict(module.named_modules()).values()]
    paths = {id(part): path for path, part in module.named_modules()}

    def watched(cls: type) -> type:
        def __getattribute__(self: Any, name: str) -> Any:
            if name not in _PLUMBING and name in object.__getattribute__(self, "__dict__"):
                seen.add((paths[id(self)], name))
            return super(watcher, self).__getattribute__(name)

        names = {"__getattribute__": __getattribute__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        watcher: Any = type(cls.__name__, (cls,), names)
        return watcher

    watchers = {cls: watched(cls) for cls in {cls for _, cls in classes}}
    try:
        for part, cls in classes:
            part.__class__ = watchers[cls]
        yield seen
    finally:
        for part, cls in classes:
            part.__class__ = cls


def _read(module: nn.Module, path: str, name: str) -> Any:
    return vars(module.get_submodule(path)).get(name, _MISSING)


_MISSING = object()


def _same(a: Any, b: Any) -> bool:
    """Whether code that reads `a` does the same where it reads `b`."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, _SCALARS):
        return repr(a) == repr(b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    return dataclasses.is_dataclass(a) and _same(vars(a), vars(b)) if hasattr(a, "__dict__") else False


def _zeros(leaf: Any) -> Any:
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, Tensor) else leaf
