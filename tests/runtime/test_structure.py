"""Arguments taken apart and results put together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsec.runtime import structure
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.structure import Record, build, take_apart

NOTHING = {"kind": "dict", "keys": [], "items": []}


def describe(value: Any, count: Iterator[int]) -> Any:
    """The tree of a nested value whose leaves are objects."""
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {"kind": kind, "items": [describe(item, count) for item in value]}
    if isinstance(value, dict):
        items = [describe(item, count) for item in value.values()]
        named = {"kind": "record", "name": "Out"} if isinstance(value, Record) else {"kind": "dict"}
        return named | {"keys": list(value), "items": items}
    if isinstance(value, Leaf):
        return {"kind": "leaf", "index": next(count)}
    return {"kind": "const", "value": value}


@dataclass(frozen=True)
class Leaf:
    number: int


NESTED = st.recursive(
    st.one_of(st.builds(Leaf, st.integers(0, 9)), st.none(), st.booleans(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(min_size=1, max_size=3), inner, max_size=3),
        st.dictionaries(st.text(min_size=1, max_size=3), inner, max_size=3).map(lambda fields: Record("Out", fields)),
    ),
    max_leaves=8,
)


@given(st.lists(NESTED, max_size=3), st.dictionaries(st.text(min_size=1, max_size=3), NESTED, max_size=3))
def test_round_trip(args: list[Any], kwargs: dict[str, Any]) -> None:
    count = iter(range(10**6))
    tree = {"args": describe(tuple(args), count), "kwargs": describe(kwargs, count)}
    tree = json.loads(json.dumps(tree))
    total = sum(len(list(structure.check(tree[part]))) for part in ("args", "kwargs"))
    leaves = take_apart(tree, args, kwargs)
    assert len(leaves) == total
    assert build(tree["args"], leaves) == tuple(args)
    assert build(tree["kwargs"], leaves) == kwargs


def test_records_read_like_objects_and_like_dicts() -> None:
    record = build({"kind": "record", "name": "Out", "keys": ["logits"], "items": [{"kind": "leaf", "index": 0}]}, [7])
    assert record.logits == record["logits"] == 7
    assert repr(record) == "Out(logits=7)"
    with pytest.raises(AttributeError, match=r"Out has no field 'loss' \(it has: logits\)"):
        _ = record.loss


TREE = {
    "args": {"kind": "tuple", "items": [{"kind": "leaf", "index": 0}]},
    "kwargs": {
        "kind": "dict",
        "keys": ["mask", "use_cache"],
        "items": [
            {"kind": "list", "items": [{"kind": "leaf", "index": 1}]},
            {"kind": "const", "value": False},
        ],
    },
}


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((1, 2), {}, "takes 1 positional arguments, 2 were given"),
        ((), {"mask": [1]}, "argument 0 is missing"),
        ((1,), {}, "argument 'mask' is missing"),
        ((1,), {"mask": [1, 2]}, "argument 'mask' is list, the program takes a list of 1"),
        ((1,), {"mask": [1], "use_cache": True}, "'use_cache' is True, the program was compiled for False"),
        ((1,), {"mask": [1], "labels": 1}, "no argument 'labels' (it has: mask, use_cache)"),
    ],
)
def test_wrong_arguments_are_named(args: tuple[Any, ...], kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        take_apart(TREE, args, kwargs)
    assert words in str(error.value)


def test_constants_may_be_left_out() -> None:
    assert take_apart(TREE, (1,), {"mask": [2]}) == [1, 2]


@pytest.mark.parametrize(
    "tree",
    [
        None,
        {"kind": "leaf", "index": -1},
        {"kind": "leaf", "index": True},
        {"kind": "tuple"},
        {"kind": "dict", "keys": ["a"], "items": []},
        {"kind": "dict", "keys": ["a", "a"], "items": [{"kind": "leaf", "index": 0}] * 2},
        {"kind": "record", "keys": [], "items": []},
        {"kind": "const", "value": [1]},
        {"kind": "object", "class": "os.system"},
    ],
)
def test_what_is_no_structure_is_refused(tree: Any) -> None:
    with pytest.raises(ArtifactError):
        list(structure.check(tree))


def test_deep_trees_are_refused() -> None:
    tree: Any = {"kind": "leaf", "index": 0}
    for _ in range(100):
        tree = {"kind": "tuple", "items": [tree]}
    with pytest.raises(ArtifactError):
        list(structure.check(tree))
