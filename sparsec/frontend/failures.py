"""Why a model could not be exported, in a sentence with the user's line."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Generator
from dataclasses import replace

from torch import nn

from sparsec.diagnostics import CompileError, Diagnostic
from sparsec.frontend import locations, rewrites
from sparsec.ir.loc import Loc

_BRANCH = re.compile(r"[Dd]ata-dependent|Could not guard|u\d+\b")
_NUMPY = re.compile(r"\.numpy\(\) is not supported|numpy.*tensor subclass|Can't call numpy")
_SPECIALISED = re.compile(
    r"Constraints violated|marked as dynamic|inferred to be a constant|specialized", re.IGNORECASE
)


_LOGGERS = ("torch.export", "torch._export", "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")


@contextlib.contextmanager
def quiet() -> Generator[None, None, None]:
    """Keep back what torch prints and logs about an export that fails: the error says it in a sentence."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    said = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(said):
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    sys.stderr.write(said.getvalue())


def explain(error: BaseException, model: nn.Module) -> CompileError:
    """`error`, raised by torch.export, as a CompileError. The caller chains the original."""
    if isinstance(error, CompileError):
        return error
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, CompileError):
            return cause
    loc = next(filter(None, map(locations.of_exception, chain)), Loc())
    text = "\n".join(f"{type(cause).__name__}: {cause}" for cause in chain)
    lines = next(filter(None, map(locations.lines_of_exception, chain)), list[str]())
    if _NUMPY.search(text):
        said = "numpy computes outside of the graph, which holds torch's operators only"
        return _with_change(Diagnostic(said, loc, hint="compute this with torch"), rewrites.change(lines))
    if _BRANCH.search(text):
        return _with_change(_data_dependent(text, loc), rewrites.change(lines))
    if _SPECIALISED.search(text):
        return CompileError(
            f"a dimension that should stay open is fixed by the model's code: {_sentence(error)}",
            loc,
            hint="compile with dynamic=False for these shapes only, or give dynamic shapes for the other dimensions",
        )
    return CompileError(
        f"{type(model).__name__} cannot be exported: {_sentence(error)}",
        loc,
        hint="the model must run under torch.export.export(model, args, kwargs, strict=False)",
    )


def _with_change(diagnostic: Diagnostic, change: rewrites.Change | None) -> CompileError:
    """The error, with the change to the user's line in the place of a general hint."""
    if change is not None:
        diagnostic = replace(diagnostic, excerpt=change.excerpt, hint=change.why)
    return CompileError([diagnostic])


def _data_dependent(text: str, loc: Loc) -> Diagnostic:
    source = loc.source
    if re.match(r"for\b", source):
        what = "this loop runs over values that are known only at run time, such as the experts that were hit"
        hint = (
            "loop over all experts, `for expert in range(num_experts):`, and drop the emptiness test; "
            "an expert without tokens computes nothing"
        )
    elif re.match(r"while\b", source):
        what = "how often this loop runs is known only at run time"
        hint = "run it a fixed number of times, and keep what is finished by torch.where"
    elif re.match(r"(if|elif|assert)\b", source):
        what = "this branch depends on values that are known only at run time"
        hint = "compute both sides and choose by torch.where"
    elif re.search(r"tolist\(\)|bincount|split\(", source):
        what = "the sizes here depend on values that are known only at run time"
        hint = (
            "replace `torch.bincount(ids, minlength=E)` by `F.one_hot(ids, E).sum(0)`, whose length is known, "
            "before `.tolist()`"
        )
    elif "one_hot" in source:
        what = "the width of this result is known only at run time"
        hint = "give one_hot the number of classes"
    else:
        what = "this line needs a value that is known only at run time"
        hint = (
            "compute with tensors instead of Python numbers here (torch.where, masks), or say what the module computes "
            "in an adapter for its class: sparsec.register_experts, docs/experts.md"
        )
    found = re.search(r"data-dependent expression (.+?)(?: \(unhinted|\.?\s*\n|$)", text)
    because = f" (torch could not decide {found[1]})" if found else ""
    return Diagnostic(what + because, loc, hint=hint)


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = list[BaseException]()
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _sentence(error: BaseException) -> str:
    """The first line of an error that says something."""
    for line in str(error).splitlines():
        if line := line.strip().rstrip(":"):
            return line[:300]
    return type(error).__name__
