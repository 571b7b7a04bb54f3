"""How a program's arguments and results are put together from tensors, as JSON trees.

{"kind": "leaf", "index": 0}                                 a tensor (or integer), by its place in the flat list
{"kind": "tuple" | "list", "items": [...]}
{"kind": "dict", "keys": [...], "items": [...]}
{"kind": "record", "name": "CausalLMOutput", "keys": [...], "items": [...]}
{"kind": "const", "value": 1}                                a scalar or null, fixed when the model was captured
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparsec.runtime.errors import ArtifactError, InputError

MAX_DEPTH = 50


class Record(dict[str, Any]):
    """A result with named fields, readable as attributes too: `out.logits` is `out["logits"]`."""

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self._name = name

    def __getattr__(self, field: str) -> Any:
        try:
            return self[field]
        except KeyError:
            raise AttributeError(f"{self._name} has no field '{field}' (it has: {', '.join(self)})") from None

    def __repr__(self) -> str:
        return f"{self._name}({', '.join(f'{key}={value!r}' for key, value in self.items())})"


def check(tree: Any, where: str = "structure", depth: int = 0) -> Iterator[int]:
    """The leaf indices of a tree, in order. Raises: ArtifactError where it is no structure."""
    if not isinstance(tree, dict) or depth > MAX_DEPTH:
        raise ArtifactError(f"{where} is not a structure tree")
    kind = tree.get("kind")
    if kind == "leaf":
        index = tree.get("index")
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise ArtifactError(f"{where} holds a leaf with index {index!r}")
        yield index
    elif kind in ("tuple", "list", "dict", "record"):
        items = tree.get("items")
        if not isinstance(items, list):
            raise ArtifactError(f"{where} holds a {kind} without items")
        if kind in ("dict", "record"):
            keys = tree.get("keys")
            good = isinstance(keys, list) and len(keys) == len(items) and len(set(map(str, keys))) == len(keys)
            if not good or not all(isinstance(key, str | int) for key in keys or ()):
                raise ArtifactError(f"{where} holds a {kind} whose keys do not fit its items")
            if kind == "record" and not isinstance(tree.get("name"), str):
                raise ArtifactError(f"{where} holds a record without a name")
        for item in items:
            yield from check(item, where, depth + 1)
    elif kind == "const":
        if not isinstance(tree.get("value"), bool | int | float | str | None):
            raise ArtifactError(f"{where} holds the constant {tree.get('value')!r}, which is no scalar")
    else:
        raise ArtifactError(f"{where} holds a node of kind {kind!r}")


def build(tree: Any, leaves: Sequence[Any]) -> Any:
    """The object that a (checked) tree describes, with `leaves` in place."""
    kind = tree["kind"]
    if kind == "leaf":
        return leaves[tree["index"]]
    if kind == "const":
        return tree["value"]
    items = [build(item, leaves) for item in tree["items"]]
    if kind == "tuple":
        return tuple(items)
    if kind == "list":
        return items
    fields = dict(zip(tree["keys"], items, strict=True))
    return fields if kind == "dict" else Record(tree["name"], fields)


def take_apart(tree: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The flat list of leaves of a call's arguments, by the tree `{"args": ..., "kwargs": ...}`.

    Keyword arguments that the tree has as positional ones are not matched by name: give them as they were captured.

    Raises:
        InputError: an argument is missing, superfluous, of another structure, or another constant than captured.
    """
    leaves = dict[int, Any]()
    positional, keywords = tree["args"], tree["kwargs"]
    if len(args) > len(positional["items"]):
        raise InputError(f"the program takes {len(positional['items'])} positional arguments, {len(args)} were given")
    for i, item in enumerate(positional["items"]):
        _take(item, args[i] if i < len(args) else _MISSING, f"argument {i}", leaves)
    known = dict(zip(keywords["keys"], keywords["items"], strict=True))
    for name in kwargs:
        if name not in known:
            raise InputError(f"the program has no argument '{name}' (it has: {', '.join(known) or 'none by name'})")
    for name, item in known.items():
        _take(item, kwargs.get(name, _MISSING), f"argument '{name}'", leaves)
    return [leaves[i] for i in range(len(leaves))]


_MISSING: Any = object()


def _take(tree: Any, value: Any, where: str, leaves: dict[int, Any]) -> None:
    kind = tree["kind"]
    if kind == "const":
        wanted = tree["value"]
        if value is not _MISSING and not (type(value) is type(wanted) and value == wanted):
            raise InputError(f"{where} is {_short(value)}, the program was compiled for {wanted!r}")
        return
    if kind == "leaf":
        if value is _MISSING:
            raise InputError(f"{where} is missing")
        leaves[tree["index"]] = value
        return
    if value is _MISSING:
        if not any(True for _ in check(tree)):
            return
        raise InputError(f"{where} is missing")
    items = tree["items"]
    if kind in ("tuple", "list"):
        if not isinstance(value, tuple | list) or len(value) != len(items):
            raise InputError(f"{where} is {_short(value)}, the program takes a {kind} of {len(items)}")
        for i, item in enumerate(items):
            _take(item, value[i], f"{where}[{i}]", leaves)
        return
    if not isinstance(value, Mapping):
        value = {key: getattr(value, key) for key in map(str, tree["keys"]) if hasattr(value, key)}
    extra = [key for key in value if key not in tree["keys"]]
    if extra:
        raise InputError(f"{where} has an unknown key {extra[0]!r}")
    for key, item in zip(tree["keys"], items, strict=True):
        _take(item, value.get(key, _MISSING), f"{where}[{key!r}]", leaves)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__
    return text if len(text) < 60 else text[:57] + "..."
