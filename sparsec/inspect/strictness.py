"""What a GPU does and Triton's interpreter does not: programs in any order, memory that holds anything, no bounds.

A kernel that is right only because its programs run one after the other, because fresh memory is zero or because
what it writes beyond a tensor harms nobody, is found out here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparsec.diagnostics import SparsecError

FENCE = 1024
"""Bytes before and behind each tensor: NaN as floats, -1 as integers."""

FILL = 255


@contextmanager
def poisoned() -> Generator[None]:
    """Have `torch.empty` give NaN, or the greatest integers."""
    was, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled: Any = torch.utils.deterministic
    before, filled.fill_uninitialized_memory = filled.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warns)
        filled.fill_uninitialized_memory = before


def fenced(what: str, run: Callable[[list[Any]], None], args: Sequence[Any]) -> None:
    """Run a launch on copies of its tensors that have fences around them, and copy back what it wrote.

    Raises: SparsecError if it wrote into a fence.
    """
    copies, given = dict[tuple[int, int], Tensor](), list[Any]()
    for arg in args:
        if not isinstance(arg, Tensor):
            given.append(arg)
            continue
        size = arg.numel() * arg.element_size()
        memory = copies.get((arg.data_ptr(), size))
        if memory is None:  # else it is given twice
            memory = copies[arg.data_ptr(), size] = torch.full((size + 2 * FENCE,), FILL, dtype=torch.uint8)
            _within(memory, arg).copy_(arg)
        given.append(_within(memory, arg))
    run(given)
    for i, arg in enumerate(args):
        if not isinstance(arg, Tensor):
            continue
        memory = copies[arg.data_ptr(), arg.numel() * arg.element_size()]
        if not bool((memory[:FENCE] == FILL).all() & (memory[-FENCE:] == FILL).all()):
            raise SparsecError(f"'{what}' writes beyond its argument {i}, {arg.dtype} {list(arg.shape)}")
        arg.copy_(_within(memory, arg))


def _within(memory: Tensor, like: Tensor) -> Tensor:
    """What is between the fences, as a tensor like another."""
    return memory[FENCE:-FENCE].view(like.dtype).view(like.shape)


@cache
def shuffle_programs() -> None:
    """Have Triton's interpreter run the programs of a grid in an order drawn by their number."""
    from triton.runtime import interpreter

    builder: Any = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def placed(x: int, y: int, z: int) -> None:
        width, height, depth = builder.grid_dim
        at = _order(width * height * depth)[(x * height + y) * depth + z]
        place(at // (height * depth), at // depth % height, at % depth)

    builder.set_grid_idx = placed


@cache
def _order(count: int) -> Sequence[int]:
    order = list(range(count))
    random.Random(count).shuffle(order)
    return order
