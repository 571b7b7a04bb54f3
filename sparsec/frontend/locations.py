"""Where a node of a graph comes from: the user's file and line, read from what torch recorded while tracing."""

from __future__ import annotations

import linecache
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from sparsec.ir.loc import UNKNOWN, Loc

if TYPE_CHECKING:
    from torch.fx import Node

_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+)', re.MULTILINE)
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_STDLIB = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
_PACKAGES = os.sep + "site-packages" + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PLUMBING = re.compile(r"[/\\]site-packages[/\\]transformers[/\\](?!models[/\\])")  # masks, caches, wrappers of forward


def of_node(node: Node) -> Loc:
    """The place in the user's program that a node was traced from."""
    scope = ""
    if stack := node.meta.get("nn_module_stack"):
        scope = str(list(stack.values())[-1][0]).replace("L['self'].", "").removeprefix("L['self']")
    frames = [(found["file"], int(found["line"])) for found in _FRAME.finditer(node.meta.get("stack_trace") or "")]
    return _innermost(frames, scope)


def of_exception(error: BaseException) -> Loc:
    """The innermost place in the user's program that an exception, or one that caused it, passed through."""
    seen: BaseException | None = error
    while seen is not None:
        place = _innermost(list(_frames(seen.__traceback__)), "")
        if place:
            return place
        seen = seen.__cause__ or seen.__context__
    return UNKNOWN


def here() -> Loc:
    """The innermost place in the user's program that is running."""
    frames, frame = list[tuple[str, int]](), sys._getframe(1)
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    return _innermost(frames[::-1], "")


def lines_of_exception(error: BaseException) -> list[str]:
    """The user's source from the line of `of_exception(error)` to the end of its file."""
    seen: BaseException | None = error
    while seen is not None:
        if (frame := _user_frame(list(_frames(seen.__traceback__)))) is not None:
            return linecache.getlines(frame[0])[frame[1] - 1 :]
        seen = seen.__cause__ or seen.__context__
    return []


def of_class(cls: type) -> Loc:
    """Where a class is defined."""
    import inspect

    try:
        file, line = inspect.getfile(cls), inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        return UNKNOWN
    return place_of(file, line, "")


def place_of(file: str, line: int, scope: str) -> Loc:
    return Loc(relative(file), line, scope, linecache.getline(file, line).strip())


@cache
def relative(file: str) -> str:
    """`file` relative to the deepest import root or working directory that holds it."""
    path = os.path.abspath(file)
    roots = {os.path.abspath(root) for root in (*sys.path, os.getcwd())}
    inside = [root for root in roots if path.startswith(root.rstrip(os.sep) + os.sep) and root != os.sep]
    return os.path.relpath(path, max(inside, key=len)) if inside else os.path.basename(path)


def _innermost(frames: list[tuple[str, int]], scope: str) -> Loc:
    if (frame := _user_frame(frames)) is not None:
        return place_of(*frame, scope)
    return Loc(scope=scope) if scope else UNKNOWN


def _user_frame(frames: list[tuple[str, int]]) -> tuple[str, int] | None:
    """File and line of the innermost frame of a user's code, of a model's where there is one."""
    frames = [
        (path, line)
        for file, line in reversed(frames)
        if not (path := os.path.abspath(file)).startswith((_TORCH, _HERE))
        and not (path.startswith(_STDLIB) and _PACKAGES not in path)
        and os.path.isfile(path)
    ]
    model_code = [frame for frame in frames if not _PLUMBING.search(frame[0])]
    return next(iter(model_code or frames), None)


def _frames(traceback: TracebackType | None) -> Iterator[tuple[str, int]]:
    while traceback is not None:
        yield traceback.tb_frame.f_code.co_filename, traceback.tb_lineno
        traceback = traceback.tb_next
