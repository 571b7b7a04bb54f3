"""The phases of the compiler and the pass manager.

    result = pipeline.run(module, target="cuda:sm_90", to="lower")
    result.module                 # after the last phase
    result.ir("fuse")             # as it stood after any phase that ran
    result.remarks                # what passes did and declined, with the user's lines

The manager, never a pass, verifies, times, counts, reports to instruments and writes the crash reproducer. Dumping,
numeric checks and progress are instruments (`sparsec.inspect.dump.Dump`).
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import walk_tb

import sparsec.dialects as _dialects
import sparsec.passes as _passes
from sparsec.diagnostics import CompileError, Diagnostic, Remark, SparsecError
from sparsec.ir.core import Module, Op, Value
from sparsec.ir.equal import clone_module, count_ops
from sparsec.ir.loc import UNKNOWN, Loc
from sparsec.ir.printer import print_module, print_op
from sparsec.ir.rewrite import source_place
from sparsec.ir.verify import problems, verify_module
from sparsec.passes.base import Pass, PassContext, parse_pipeline, print_pipeline

VERSION = 1
"""Version of the IR's text, which a module says of itself."""

PHASES = ("capture", "raise", "place", "fuse", "schedule", "lower")

PIPELINES: dict[str, str] = {
    "capture": "",
    "raise": (
        "recompose,canonicalize,cse,raise-experts,dce,inline,canonicalize,cse,"
        "canonicalize-routers,dce,raise-route,canonicalize-routers,canonicalize,cse,dce,"
        "derive-weights"
    ),
    "place": "place-experts,overlap",
    "fuse": "fuse-layer,fuse-route-group,fuse-experts,cse,dce",
    "schedule": "pack-banks,schedule",
    "lower": "lower-kernels,flatten-linears,dce",
}
assert _dialects and _passes  # imported to register ops and passes


@dataclass(frozen=True)
class PassRecord:
    """One run of a pass: `ms` is the pass alone, without verification; `counts` says how often each rule applied."""

    phase: str
    name: str  #: with its options, as in a pipeline
    ms: float
    ops_before: int
    ops_after: int
    changed: bool
    counts: dict[str, int]
    remarks: tuple[Remark, ...]
    made: dict[Op, str] = field(repr=False, compare=False, default_factory=dict[Op, str])  #: as of `Result`
    gone: dict[Op, str] = field(repr=False, compare=False, default_factory=dict[Op, str])  #: op -> rule that removed it
    replaced: dict[Value, Value] = field(repr=False, compare=False, default_factory=dict[Value, Value])  #: new -> old


@dataclass(frozen=True)
class Result:
    """A module after its passes, and how it came there."""

    module: Module
    records: tuple[PassRecord, ...]
    phases: dict[str, Module] = field(repr=False)  #: the module as it stood after each phase that ran
    made: dict[Op, str] = field(repr=False, default_factory=dict[Op, str])  #: op -> the rule that made it, from what

    @property
    def remarks(self) -> tuple[Remark, ...]:
        return tuple(remark for record in self.records for remark in record.remarks)

    def ir(self, phase: str) -> Module:
        """The module after a phase. Raises: SparsecError for a phase that did not run."""
        if phase not in self.phases:
            raise SparsecError(f"phase '{phase}' did not run (there are: {', '.join(self.phases)})")
        return self.phases[phase]

    def before(self, phase: str) -> str:
        """The phase in front of one that ran, itself for the first. Raises: SparsecError as of `ir`."""
        self.ir(phase)
        names = list(self.phases)
        return names[max(0, names.index(phase) - 1)]

    def text(self, phase: str) -> str:
        """The text of the module after a phase."""
        return print_module(self.ir(phase))


class Instrument:
    """Watches a run; every method may be left as it is. Raising from `after` ends the run (numeric checks do)."""

    def start(self, module: Module, passes: Sequence[tuple[str, Pass]]) -> None:
        """Before the first pass, with all (phase, pass) to come."""

    def before(self, phase: str, pass_: Pass, module: Module) -> None:
        """Before a pass."""

    def override(self, record: PassRecord, module: Module) -> str:
        """After a pass: put something else into `module`, and say what; "" leaves it as it is."""
        return ""

    def after(self, record: PassRecord, module: Module) -> None:
        """After a pass whose result verified, with what was put in its place."""

    def phase_done(self, phase: str, module: Module) -> None:
        """After the last pass of a phase."""

    def fail(self, reproducer: str) -> Path | None:
        """A pass failed: keep its reproducer and say where, or None."""
        return None

    def finish(self, result: Result) -> None:
        """After the last pass."""


def phase_passes(phase: str) -> tuple[Pass, ...]:
    """The passes of a phase."""
    return parse_pipeline(PIPELINES[phase])


def run(
    module: Module,
    *,
    target: str = "cpu",
    start: str | None = None,
    to: str = "lower",
    instruments: Sequence[Instrument] = (),
    verify: bool = True,
) -> Result:
    """Take a module through the phases after `start` (default: the module's own `phase`) up to and including `to`.

    The module is changed in place; its attributes `phase` and (from `fuse` on) `target` are kept up to date.
    Raises: CompileError for a phase that is not, for a module past `to`, and for what a pass or the verifier finds.
    """
    if (version := module.attrs.get("version", VERSION)) != VERSION:
        raise CompileError(f"the module's text is of version {version}, this sparsec reads version {VERSION}")
    done = _phase(start or str(module.attrs.get("phase", "capture")))
    last = _phase(to)
    if done > last:
        raise CompileError(f"the module is past phase '{to}': it went through '{PHASES[done]}'")
    known = module.attrs.get("target", target)
    if known != target:
        raise CompileError(
            f"the module was fused for {known}, not for {target}", hint="go on from the text of phase `raise`"
        )
    todo = {phase: phase_passes(phase) for phase in PHASES[done + 1 : last + 1]}
    manager = _Manager(module, target, instruments, verify)
    manager.start(list(_pairs(todo)))
    last_copy = clone_module(module)
    kept: dict[str, Module] = {PHASES[done]: last_copy}
    if verify:
        manager.verify("the module given", None)
    for phase, passes in todo.items():
        changed = manager.run(phase, passes, last_copy)
        module.attrs["phase"] = phase
        if PHASES.index(phase) >= PHASES.index("fuse"):
            module.attrs["target"] = target
        last_copy = clone_module(module) if changed else Module(last_copy.funcs.values(), module.attrs)
        kept[phase] = last_copy
        for instrument in instruments:
            instrument.phase_done(phase, module)
    return manager.finish(kept)


def run_passes(
    module: Module,
    passes: str | Sequence[Pass],
    *,
    target: str = "cpu",
    instruments: Sequence[Instrument] = (),
    verify: bool = True,
) -> Result:
    """Run a pipeline of one's own, given as passes or as text; the module is changed in place, its phase stays."""
    todo = parse_pipeline(passes) if isinstance(passes, str) else tuple(passes)
    manager = _Manager(module, target, instruments, verify)
    manager.start([("", pass_) for pass_ in todo])
    manager.run("", todo, clone_module(module))
    return manager.finish({})


_HEADER = re.compile(r"^// (pipeline|target): (.*)$", re.MULTILINE)


def reproducer_header(text: str) -> tuple[str, str] | None:
    """Pipeline and target that the header of a crash reproducer names; None if the text has no such header."""
    found = dict(_HEADER.findall(text.split("\nmodule", 1)[0]))
    return (found["pipeline"], found.get("target", "cpu")) if "pipeline" in found else None


def _phase(name: str) -> int:
    if name not in PHASES:
        raise CompileError(f"there is no phase '{name}' (there are: {', '.join(PHASES)})")
    return PHASES.index(name)


def _pairs(todo: dict[str, tuple[Pass, ...]]) -> Iterator[tuple[str, Pass]]:
    for phase, passes in todo.items():
        for pass_ in passes:
            yield phase, pass_


class _Manager:
    """Runs passes one by one."""

    def __init__(self, module: Module, target: str, instruments: Sequence[Instrument], verify: bool) -> None:
        self.module, self.target, self.instruments, self.checked = module, target, instruments, verify
        self.records: list[PassRecord] = []
        self.made: dict[Op, str] = {}
        self.ctx: PassContext | None = None  # of the pass that runs

    def start(self, passes: list[tuple[str, Pass]]) -> None:
        for instrument in self.instruments:
            instrument.start(self.module, passes)

    def finish(self, phases: dict[str, Module]) -> Result:
        result = Result(self.module, tuple(self.records), phases, self.made)
        for instrument in self.instruments:
            instrument.finish(result)
        return result

    def run(self, phase: str, passes: Sequence[Pass], snapshot: Module) -> bool:
        """Run passes; `snapshot` is a copy of the module before them. Returns: whether one changed anything."""
        first = len(self.records)
        for i, pass_ in enumerate(passes):
            for instrument in self.instruments:
                instrument.before(phase, pass_, self.module)
            try:
                record = self._one(phase, pass_)
            except Exception as error:
                raise self._explain(error, passes, i, snapshot) from error
            for instrument in self.instruments:
                if said := instrument.override(record, self.module):
                    record = self._overridden(record, said)
            for instrument in self.instruments:
                instrument.after(record, self.module)
        return any(record.changed for record in self.records[first:])

    def _one(self, phase: str, pass_: Pass) -> PassRecord:
        self.ctx = ctx = PassContext(self.target, pass_.name)
        before, began = count_ops(self.module), time.perf_counter()
        try:
            pass_.run(self.module, ctx)
        finally:
            self.made.update(ctx.rewriter.made)
        ms = (time.perf_counter() - began) * 1e3
        counts = dict(ctx.counts)
        if self.checked and counts:
            self.verify(f"pass '{pass_}'", ctx)
        after = count_ops(self.module)
        made, remarks = dict(ctx.rewriter.made), tuple(ctx.remarks)
        gone, replaced = dict(ctx.rewriter.gone), dict(ctx.rewriter.replaced)
        record = PassRecord(phase, str(pass_), ms, before, after, bool(counts), counts, remarks, made, gone, replaced)
        self.records.append(record)
        return record

    def _overridden(self, record: PassRecord, said: str) -> PassRecord:
        """The record of a pass whose result was replaced, once that has verified."""
        self.verify(said, None)
        counts = {**record.counts, said: 1}
        self.records[-1] = replace(record, changed=True, counts=counts, ops_after=count_ops(self.module))
        return self.records[-1]

    def verify(self, maker: str, ctx: PassContext | None) -> None:
        """Check the module; a problem names the pass and the rule that made the op."""
        try:
            verify_module(self.module)
        except CompileError as error:
            note = f"found after {maker}" if ctx else f"found in {maker}"
            rules = [self.made.get(problem.op) if problem.op else None for problem in problems(self.module)]
            made = [(note, *([f"made by {rule}"] if rule else [])) for rule in rules]
            raise CompileError(map(_with_notes, error.diagnostics, made)) from error

    def _explain(self, error: Exception, passes: Sequence[Pass], failed: int, snapshot: Module) -> CompileError:
        """The error with where its reproducer is."""
        message = str(error) if isinstance(error, SparsecError) else f"{type(error).__name__}: {error}"
        header = [f"// {line}" for line in message.splitlines()]
        header += [f"// pipeline: {print_pipeline(passes[: failed + 1])}", f"// target: {self.target}"]
        text = "\n".join(header) + "\n\n" + print_module(snapshot)
        place = next((path for i in self.instruments if (path := i.fail(text)) is not None), None)
        if place is None:
            with tempfile.NamedTemporaryFile("w", suffix=".sparsec", prefix="crash-", delete=False) as file:
                file.write(text)
                place = Path(file.name)
        notes = (f"reproduce with: sparsec opt {place}", f"the least that fails: sparsec opt {place} --reduce")
        if isinstance(error, CompileError):
            return CompileError([*error.diagnostics[:-1], _with_notes(error.diagnostics[-1], notes)])
        loc, where = self._where(error)
        return CompileError([Diagnostic(f"pass '{passes[failed]}' failed: {message}", loc, notes=(*where, *notes))])

    def _where(self, error: Exception) -> tuple[Loc, tuple[str, ...]]:
        """Where a pass raised what it should not: the user's line, the compiler's, and the rule with its op."""
        frames = [(frame.f_globals.get("__name__", ""), line) for frame, line in walk_tb(error.__traceback__)]
        ours = [source_place(name, line) for name, line in frames if name.startswith("sparsec.")]
        notes = [f"raised at {ours[-1]}"] if ours else []
        if self.ctx is None or self.ctx.rewriter.failed is None:
            return UNKNOWN, tuple(notes)
        rule, op = self.ctx.rewriter.failed
        return op.loc, (*notes, f"in rule {rule}, which was looking at: {print_op(op).splitlines()[0]}")


def _with_notes(diagnostic: Diagnostic, notes: tuple[str, ...]) -> Diagnostic:
    return Diagnostic(
        diagnostic.message,
        diagnostic.loc,
        diagnostic.severity,
        diagnostic.excerpt,
        (*diagnostic.notes, *notes),
        diagnostic.hint,
    )
