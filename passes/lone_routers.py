"""Routers that no bank reads: choices among as many things as the model has experts, told apart from sampling."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from sparsec.ir.core import Func, Op, Value
from sparsec.ir.types import TensorType
from sparsec.passes.row_slice import LIMIT_OF_SEARCH
from sparsec.passes.rows import LINEAR, operand_rows
from sparsec.passes.rules import attr, negative

MOST_EXPERTS = 4096
CHOICES = ("aten.topk", "aten.argmax", "aten.max.dim", "aten.sort", "aten.argsort")
READERS = (
    *("aten.gather", "aten.one_hot", "aten.eq.Scalar", "aten.eq.Tensor", "aten.index.Tensor", "aten.index_put"),
    *("aten.scatter.value", "aten.scatter.src", "aten.index_select", "aten.nonzero", "aten.bincount", "aten.histc"),
)
"""What a model does with the numbers of experts, one of them at least."""
COMPARISONS = tuple(f"aten.{name}.Tensor" for name in ("lt", "le", "gt", "ge"))


def lone_routers(main: Func, banked: set[Value]) -> Iterator[tuple[Op, int]]:
    """The first choice made of each tensor of logits that no bank reads, with the number of experts.

    Args:
        banked: the logits of the routers that were raised.
    """
    experts, reported = bank_sizes(main), set(banked)
    for op in main.body.ops:
        if op.name not in CHOICES or not isinstance(op.operands[0].type, TensorType):
            continue
        size, logits = _choices(op), _logits(op)
        if size not in experts or logits is None or logits in reported or not _numbers_used(op):
            continue
        reported.add(logits)
        yield op, size


def bank_sizes(main: Func) -> set[int]:
    """Numbers of experts that the weights allow: E where a parameter is [E, ., .], or E modules have one alike."""
    alike, sizes = Counter[tuple[str, object]](), set[int]()
    for arg in main.body.args:
        attrs: Mapping[str, object] = main.arg_attrs.get(arg, {})
        if attrs.get("kind") not in ("param", "derived", "buffer") or not isinstance(arg.type, TensorType):
            continue
        shape, source = arg.type.shape, str(attrs.get("source", ""))
        if len(shape) == 3 and isinstance(shape[0], int) and min(int(dim) for dim in shape[1:]) > 1:
            sizes.add(shape[0])
        if len(shape) == 2:
            for number in re.finditer(r"\d+", source):
                alike[f"{source[: number.start()]}*{source[number.end() :]}", shape] += 1
    sizes |= {count for count in alike.values() if count > 1}
    return {size for size in sizes if 1 < size <= MOST_EXPERTS}


def _choices(op: Op) -> int:
    """Among how many an op chooses; 0 if not along the last axis, or all of them are taken."""
    type, dim = op.operands[0].tensor, attr(op, "dim")
    if not type.dtype.is_float or type.rank < 2 or not isinstance(dim, int) or negative(dim, type.rank) != -1:
        return 0
    size = type.shape[-1]
    taken = op.attrs.get("k", 1)
    return size if isinstance(size, int) and taken != size else 0


def _logits(op: Op) -> Value | None:
    """The result of the linear layer that the scores of a choice come from, by row-local ops alone."""
    value = op.operands[0]
    stack, seen = [(value, value.tensor.rank - 1)], set[Value]()
    while stack and len(seen) < LIMIT_OF_SEARCH:
        value, rows = stack.pop()
        made = value.op
        if made is None or value in seen or not rows:
            continue
        seen.add(value)
        if made.name in LINEAR:
            return value if made.name != "aten.embedding" else None
        verdict = operand_rows(made, rows)
        if isinstance(verdict, str):
            return None
        stack += zip(made.operands, verdict, strict=True)
    return None


def _numbers_used(op: Op) -> bool:
    """Whether something is looked up or told apart by the numbers of what is chosen, or by its scores as a bound."""
    stack, seen = [op.results[-1]], set[Value]()
    bounds = [op.results[0]] if len(op.results) > 1 else []
    while bounds:
        for user in bounds.pop().users:
            if user.name in COMPARISONS:
                return True
            if user.name in ("aten.slice.Tensor", "aten.select.int", "aten.unsqueeze", "aten.reshape"):
                bounds.append(user.results[0])
    while stack and len(seen) < LIMIT_OF_SEARCH:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        for user in value.users:
            if user.name in READERS:
                return True
            if user.results and isinstance(user.results[0].type, TensorType):
                stack += [result for result in user.results if not result.tensor.dtype.is_float]
    return False
