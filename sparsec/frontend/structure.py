"""How arguments and results are put together from tensors: the JSON trees of a plan's `inputs` and `structure`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils._pytree import TreeSpec

from sparsec.diagnostics import CompileError

LEAF: Any = object()
"""Stands for a tensor in the list of leaves given to `tree`; everything else there is a constant."""


def tree(spec: TreeSpec, leaves: Sequence[Any]) -> Any:
    """The JSON tree of a structure: `leaves` holds LEAF for each tensor, and the value of each constant.

    Raises: CompileError for a container or a constant that JSON cannot say.
    """
    numbers = iter(range(len(leaves)))
    return _tree(spec, iter(leaves), numbers)


def _tree(spec: TreeSpec, leaves: Iterator[Any], numbers: Iterator[int]) -> Any:
    if spec.is_leaf():
        leaf = next(leaves)
        if leaf is LEAF:
            return {"kind": "leaf", "index": next(numbers)}
        if leaf is None or isinstance(leaf, bool | int | float | str):
            return {"kind": "const", "value": leaf}
        raise CompileError(f"the model takes or returns a {type(leaf).__name__}, which a compiled model cannot hold")
    items = [_tree(child, leaves, numbers) for child in _children(spec)]
    if spec.type is tuple or spec.type is list:
        return {"kind": spec.type.__name__, "items": items}
    if spec.type is dict:
        return {"kind": "dict", "keys": [str(key) for key in spec.context], "items": items}
    return {"kind": "record", "name": spec.type.__name__, "keys": _keys(spec), "items": items}


def _children(spec: TreeSpec) -> list[TreeSpec]:
    # The method is newer than the oldest torch that we run on.
    return spec.children() if hasattr(spec, "children") else getattr(spec, "children_specs")  # noqa: B009


def _keys(spec: TreeSpec) -> list[str]:
    """Field names of a record: a named tuple, a dataclass, one of transformers' outputs."""
    context: Any = spec.context
    for names in (getattr(context, "_fields", None), getattr(spec.type, "_fields", None), *_candidates(context)):
        if (
            isinstance(names, list | tuple)
            and len(names) == spec.num_children
            and all(isinstance(name, str) for name in names)
        ):
            return list(names)
    raise CompileError(
        f"the model takes or returns a {spec.type.__name__ if spec.type else spec}, whose fields have no names",
        hint="use tensors, tuples, lists, dicts, dataclasses or named tuples",
    )


def _candidates(context: Any) -> Iterator[Any]:
    yield context
    if isinstance(context, list | tuple):
        yield from context
    if isinstance(context, dict):
        yield list(context)
