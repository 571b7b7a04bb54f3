"""What a pass is, how passes are found by name, and pipelines as text: `canonicalize,raise-route{max-ops=64},dce`."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, get_type_hints

from sparsec.diagnostics import CompileError, Remark
from sparsec.ir.core import Module, Op
from sparsec.ir.rewrite import Rewriter, Rule, rewrite


@dataclass(frozen=True)
class Pass(ABC):
    """Base of every pass: a frozen dataclass whose fields are the options of its text form."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, module: Module, ctx: PassContext) -> None:
        """Change `module`; say through `ctx` what was done and what was declined."""

    def __str__(self) -> str:
        given = [
            f"{option.name.replace('_', '-')}={_spell(getattr(self, option.name))}"
            for option in dataclasses.fields(self)
            if getattr(self, option.name) != option.default
        ]
        return f"{self.name}{{{' '.join(given)}}}" if given else self.name


@dataclass
class PassContext:
    """What a pass may use beside the module: the target, the rewriter, and the only ways to speak."""

    target: str = "cpu"
    pass_name: str = ""
    rewriter: Rewriter = field(default_factory=Rewriter)
    remarks: list[Remark] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  #: how often each rule applied in this pass

    def rewrite(self, module: Module, rules: Sequence[Rule]) -> None:
        """Apply rules until none matches any more."""
        self.rewriter.counts.clear()
        rewrite(module, rules, self.rewriter)
        for rule, count in self.rewriter.counts.items():
            self.counts[str(rule)] += count

    def changed(self, what: str, count: int = 1) -> None:
        """Note a change made without a rule."""
        if count:
            self.counts[what] += count

    def passed(self, op: Op, message: str) -> None:
        """Say what was done at an op."""
        self._remark("passed", op, message, "")

    def missed(self, op: Op, *, why: str, try_: str = "") -> None:
        """Say that something was not done at an op, why, and what the user can try."""
        self._remark("missed", op, why, try_)

    def _remark(self, kind: Any, op: Op, message: str, suggestion: str) -> None:
        rule = str(self.rewriter.current) if self.rewriter.current else ""
        remark = Remark(kind, self.pass_name, rule, op.loc, message, suggestion)
        if remark not in self.remarks:
            self.remarks.append(remark)


PASSES: dict[str, type[Pass]] = {}
PassT = TypeVar("PassT", bound=Pass)


def register(cls: type[PassT]) -> type[PassT]:
    """Make a pass known by its name."""
    PASSES[cls.name] = cls
    return cls


_ITEM = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """Passes from text. Raises: CompileError for an unknown pass or option, or a wrong value."""
    passes, at = list[Pass](), 0
    while at < len(text):
        item = _ITEM.match(text, at)
        if item is None:
            raise CompileError(
                f"cannot read the pipeline from {text[at:]!r} on", hint="write `pass,pass{option=value}`"
            )
        passes.append(_make(item[1], item[2] or ""))
        at = item.end()
    return tuple(passes)


def print_pipeline(passes: Iterable[Pass]) -> str:
    """Passes as text, which `parse_pipeline` reads."""
    return ",".join(map(str, passes))


def _make(name: str, options: str) -> Pass:
    cls = PASSES.get(name)
    if cls is None:
        raise CompileError(f"there is no pass '{name}'{_meant(name, PASSES)}")
    hints = get_type_hints(cls)
    known = {option.name.replace("_", "-"): option.name for option in dataclasses.fields(cls)}
    given: dict[str, Any] = {}
    for item in options.replace(",", " ").split():
        key, _, value = item.partition("=")
        if key not in known:
            raise CompileError(f"pass '{name}' has no option '{key}'{_meant(key, known)}")
        given[known[key]] = _read(f"{name}{{{key}}}", value, hints[known[key]])
    return cls(**given)


def _read(where: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False, "": True}[text]
        return kind(text)
    except (KeyError, ValueError):
        raise CompileError(f"option {where} needs a {kind.__name__}, not {text!r}") from None


def _spell(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _meant(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean '{close[0]}'?" if close else f" (there are: {', '.join(names) or 'none'})"


@dataclass(frozen=True)
class Option:
    """An option of a pass, for help texts."""

    name: str
    type: str
    default: str
    doc: str


def options(cls: type[Pass]) -> tuple[Option, ...]:
    """The options of a pass; their documentation is the `#:` comment on the field's line."""
    hints, source = get_type_hints(cls), inspect.getsource(cls)
    found = list[Option]()
    for option in dataclasses.fields(cls):
        comment = re.search(rf"^    {option.name}\b[^\n]*#:\s*([^\n]*)", source, re.MULTILINE)
        found.append(
            Option(
                option.name.replace("_", "-"),
                hints[option.name].__name__,
                _spell(option.default),
                comment[1].strip() if comment else "",
            )
        )
    return tuple(found)
