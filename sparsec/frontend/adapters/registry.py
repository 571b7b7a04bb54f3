"""Banks of experts written so that torch.export cannot trace them: adapters, by the class that they stand in for.

An adapter is a function with the signature of the method that it replaces, `forward` unless said otherwise, and says
with the operators of `sparsec.ops` what that method computes. It runs in place of the method while a model is captured
(`adapted`); the model itself is not changed.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar, overload

from torch import nn

from sparsec.diagnostics import CompileError, Diagnostic, SparsecError
from sparsec.frontend import locations

Adapter = TypeVar("Adapter", bound=Callable[..., Any])

_BUILTIN = "sparsec.frontend.adapters.families"
_PATH = re.compile(r"[\w.]+:[\w.]+")


@dataclass(frozen=True)
class Registered:
    """An adapter: a function with the signature of the method that it replaces, after the module itself."""

    run: Callable[..., Any]
    warning: str = ""  #: what the user of such a model should know


_by_target: dict[tuple[str, str], Registered] = {}  # ("module:Class", method)


@overload
def register_experts(target: type[nn.Module] | str, adapter: Adapter, *, method: str = ...) -> Adapter: ...
@overload
def register_experts(target: type[nn.Module] | str, *, method: str = ...) -> Callable[[Adapter], Adapter]: ...
def register_experts(
    target: type[nn.Module] | str, adapter: Callable[..., Any] | None = None, *, method: str = "forward"
) -> Callable[..., Any]:
    """Run modules of a class by `adapter` wherever sparsec captures them. Also a decorator.

        @sparsec.register_experts("my_package.modeling:MyExperts")
        def my_experts(module, x, ids, weights):
            return sparsec.ops.experts(x, ids, weights, module.up, module.down, activation=torch.relu)

    Args:
        target: the class, or "module:Class", which need not be importable yet. The module may be the end of a dotted
            path: "modeling_deepseek:DeepseekV2MoE" is that class wherever a checkpoint's own code was put. Subclasses
            that do not override `method` are meant as well.
        adapter: takes the module and then what `method` takes; returns what `method` returns. It is traced, so that
            it must not branch on the values of tensors.
        method: the method that it replaces.

    A later registration for the same target and method takes the place of an earlier one, and of one of sparsec's own.

    Raises: SparsecError for a target that cannot be meant.
    """

    def register(found: Adapter) -> Adapter:
        if not callable(found):
            raise SparsecError(f"the adapter for {_path(target, method)} is a {type(found).__name__}, not a function")
        _by_target[_path(target, method), method] = Registered(found)
        return found

    _builtin()
    _path(target, method)
    return register if adapter is None else register(adapter)


def unregister_experts(target: type[nn.Module] | str, *, method: str = "forward") -> None:
    """Forget an adapter. Raises: SparsecError if there is none."""
    _builtin()
    path = _path(target, method)
    if _by_target.pop((path, method), None) is None:
        raise SparsecError(f"no adapter is registered for '{method}' of {path}")


@contextmanager
def adapted(model: nn.Module) -> Generator[None, None, None]:
    """Run every module of `model` that has an adapter by it, for a while."""
    changed = install(model)
    try:
        yield
    finally:
        remove(changed)


def install(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Put adapters in the place of the methods of modules, and say of which; `remove` takes this list.

    A module whose method is already replaced on the module itself is left alone.
    """
    changed = list[tuple[nn.Module, str]]()
    for module, method, registered in _found(model):
        if method not in vars(module):
            vars(module)[method] = MethodType(registered.run, module)
            changed.append((module, method))
    return changed


def remove(changed: list[tuple[nn.Module, str]]) -> None:
    """Undo `install`."""
    for module, method in changed:
        vars(module).pop(method, None)


def warnings(model: nn.Module) -> list[Diagnostic]:
    """What the adapters of `model` have to say of it, once for each class."""
    said = {type(module): registered.warning for module, _, registered in _found(model) if registered.warning}
    return [Diagnostic(text, locations.of_class(cls), severity="warning") for cls, text in said.items()]


def _found(model: nn.Module) -> Iterator[tuple[nn.Module, str, Registered]]:
    of_type = dict[type, list[tuple[str, Registered]]]()
    for module in model.modules():
        if (cls := type(module)) not in of_type:
            of_type[cls] = list(_of(cls))
        for method, registered in of_type[cls]:
            yield module, method, registered


def _of(cls: type) -> Iterator[tuple[str, Registered]]:
    """The adapters for a class: those whose target is the class that gave it the method."""
    _builtin()
    for (path, method), registered in _by_target.items():
        module, _, name = path.partition(":")
        for base in cls.__mro__:
            if base.__qualname__ == name and f".{base.__module__}".endswith(f".{module}"):
                if not callable(getattr(base, method, None)):
                    raise CompileError(
                        f"an adapter is registered for '{method}' of {path}, which has no such method",
                        locations.of_class(base),
                    )
                if getattr(cls, method) is getattr(base, method):
                    yield method, registered


def _path(target: Any, method: str) -> str:
    if isinstance(target, str):
        if not _PATH.fullmatch(target):
            raise SparsecError(f"'{target}' names no class: write it as 'package.module:Class'")
        return target
    if not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise SparsecError(f"{target!r} is no class of modules, and no path of one ('package.module:Class')")
    if not callable(getattr(target, method, None)):
        raise SparsecError(f"{target.__qualname__} has no method '{method}' that an adapter could replace")
    return f"{target.__module__}:{target.__qualname__}"


def _builtin() -> None:
    """Enter sparsec's own adapters, once, before anything is looked up."""
    if not _state.loaded:
        _state.loaded = True
        for target, registered in importlib.import_module(_BUILTIN).ADAPTERS.items():
            _by_target.setdefault(target, registered)


class _State:
    loaded = False


_state = _State()
