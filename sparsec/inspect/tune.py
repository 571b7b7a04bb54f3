"""Refine an artifact's schedule on the GPU that it will run on, in a bounded time.

The cost model names a few variants for each GEMM and range of token counts; they are compiled and timed, and the table
of the artifact is written anew with what was measured. Nothing else of the artifact changes, and what runs is still
compiled ahead of time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsec.codegen.artifact import rewrite_kernels
from sparsec.codegen.triton.early import may_start
from sparsec.codegen.triton.emit import TritonKernel, emit_kernel
from sparsec.diagnostics import CompileError, SparsecError
from sparsec.dialects.moe import GatherGemm, GemmCombine
from sparsec.inspect.info import load_module
from sparsec.ir.core import Func
from sparsec.ir.printer import print_module
from sparsec.passes.chips import Chip, chip
from sparsec.passes.cost import BUCKETS, Candidate, best, invariance, merged, of_orders
from sparsec.passes.roofline import predict
from sparsec.passes.schedule import allowed_loss, gemm_of
from sparsec.passes.variants import Variant
from sparsec.runtime.artifact import Artifact, open_artifact
from sparsec.runtime.plan import Kernel
from sparsec.runtime.plan import Variant as Compiled

Timer = Callable[[Func, Kernel, Mapping[str, bytes], int], float]
"""Microseconds of a kernel that has one variant, given its function, its files, and how many tokens it gets."""

FAMILIES_TRIED = 3
"""Families that are timed for a number of tokens: those that the model finds fastest, by their best two variants."""

FAR = 1.5
"""How much longer than the fastest, by the model, a variant may take to be timed."""

NEAR = 1.02
"""How much longer than the fastest, by measurement, a variant may take where it spares another binary."""


@dataclass(frozen=True)
class Change:
    """A range of token counts of a kernel, before and after.

    Args:
        up_to: None for any number.
        before, after: variants as text.
        before_us, after_us: as measured at the range's upper end; None where the time did not suffice.
        predicted_us: by the model, for `after`.
    """

    kernel: str
    up_to: int | None
    before: str
    after: str
    before_us: float | None
    after_us: float | None
    predicted_us: float


def tune(
    path: Path, seconds: float = 60.0, timer: Timer | None = None, clock: Callable[[], float] = time.monotonic
) -> list[Change]:
    """Refine the artifact at `path` and say what came of it, range by range.

    Args:
        seconds: after which no further variant is compiled or timed.
        timer: times a kernel; the default does so on the GPU here.
        clock: tells seconds.

    Raises:
        SparsecError: it is not for a GPU, or this machine cannot run it, or no kernel of it has choices.
        ArtifactError: it is damaged, or cannot be written.
    """
    end = clock() + seconds
    artifact = open_artifact(path)
    if artifact.target == "cpu":
        raise SparsecError(f"{path} is for the CPU, whose kernels choose by themselves: there is nothing to tune")
    if timer is None:
        from sparsec.inspect.timing import GpuTimer

        timer = GpuTimer(artifact.target)
    module, on = load_module(path), chip(artifact.target)
    funcs = [module.funcs[kernel.name] for kernel in artifact.plan.kernels.values() if _has_choices(kernel)]
    if not funcs:
        raise SparsecError(f"{path} has no GEMM of experts that Triton's code computes: there is nothing to tune")
    changes, made = list[Change](), dict[str, TritonKernel]()
    for i, func in enumerate(funcs):
        share = clock() + (end - clock()) / (len(funcs) - i)
        search = Search(func, artifact, on, allowed_loss(module), timer, clock, share)
        search.run()
        changes += search.settle()
        made[func.name] = emit_kernel(func, artifact.target, may_start(func, module.main))
    kernels = dict(artifact.plan.kernels)
    for name, kernel in made.items():
        kernels[name] = replace(kernels[name], variants=list(kernel.variants))
    files = {name: content for kernel in made.values() for name, content in kernel.files.items()}
    rewrite_kernels(artifact, replace(artifact.plan, kernels=kernels), files, print_module(module))
    return changes


def _has_choices(kernel: Kernel) -> bool:
    if kernel.backend != "triton" or kernel.op not in ("moe.gather_gemm", "moe.gemm_combine"):
        return False
    return any("predicted_us" in variant.config.get("choice", {}) for variant in kernel.variants)


@dataclass
class Search:
    """Times variants of one kernel function until `clock` says `end`."""

    func: Func
    artifact: Artifact
    on: Chip
    most: float  #: what one order of adding may cost, as a share
    timer: Timer
    clock: Callable[[], float]
    end: float
    measured: dict[int, dict[Variant, float]] = field(default_factory=dict[int, dict[Variant, float]])
    compiled: dict[Variant, TritonKernel | None] = field(default_factory=dict[Variant, TritonKernel | None])

    def __post_init__(self) -> None:
        op: Any = self.func.body.ops[0]
        assert isinstance(op, GatherGemm | GemmCombine)
        self.op, self.gemm = op, gemm_of(op)
        self.kernel = self.artifact.plan.kernels[self.func.name]
        self.before = [(given.get("up_to"), _variant(given)) for given in op.variants]

    def run(self) -> None:
        """Time what may be best for each number of tokens, far apart ones first."""
        for tokens in (*BUCKETS[::4], *BUCKETS[2::4], *BUCKETS[1::2]):
            times = dict[Variant, float]()
            for variant in self._tried(tokens):
                if self.clock() >= self.end:
                    return
                us = self._time(variant, tokens)
                if us is not None:
                    times[variant] = us
            if times:
                self.measured[tokens] = times

    def settle(self) -> Iterator[Change]:
        """Write the fastest into the op; what was not timed stays as it was. Yields: what it was and is."""
        near = list[Mapping[Variant, float]]()
        for tokens in BUCKETS:
            times = self.measured.get(tokens) or {self._present(tokens): 1.0}
            least = min(times.values())
            near.append({v: us / least for v, us in times.items() if us <= NEAR * least})
        table = list[dict[str, Any]]()
        for _, last, variant in merged(near):
            tokens = BUCKETS[last]
            made = predict(self.gemm, variant, tokens, self.on)
            assert made is not None
            times = self.measured.get(tokens, {})
            measured = {"measured_us": round(times[variant], 2)} if variant in times else {}
            up_to = None if last == len(BUCKETS) - 1 else tokens
            said = {"predicted_us": round(made.us, 2), "limiter": made.limiter, **measured}
            table.append({**({} if up_to is None else {"up_to": up_to}), **asdict(variant), **said})
            before = self._present(tokens)
            yield Change(
                self.func.name, up_to, str(before), str(variant), times.get(before), times.get(variant), made.us
            )
        self.op.attrs["variants"] = tuple(table)

    def _present(self, tokens: int) -> Variant:
        return next(variant for up_to, variant in self.before if up_to is None or tokens <= up_to)

    def _tried(self, tokens: int) -> list[Variant]:
        """What the artifact has, and the model's best two of each of the best few families."""
        orders = invariance(self.gemm, self.on, self.most).orders
        least = best(self.gemm, tokens, self.on).made.us
        by_family = dict[str, list[Candidate]]()
        for candidate in of_orders(self.gemm, tokens, self.on, orders):
            if candidate.made.us <= FAR * least:
                by_family.setdefault(candidate.variant.kernel, []).append(candidate)
        found = [c.variant for group in list(by_family.values())[:FAMILIES_TRIED] for c in group[:2]]
        return list(dict.fromkeys([self._present(tokens), *found]))

    def _time(self, variant: Variant, tokens: int) -> float | None:
        """Microseconds; None if it cannot be compiled after all."""
        if variant not in self.compiled:
            self.compiled[variant] = self._compile(variant, tokens)
        made = self.compiled[variant]
        if made is None:
            return None
        kernel = replace(self.kernel, variants=[Compiled(None, made.variants[0].config)])
        return self.timer(self.func, kernel, made.files, tokens)

    def _compile(self, variant: Variant, tokens: int) -> TritonKernel | None:
        most = max((t for t in BUCKETS if predict(self.gemm, variant, t, self.on) is not None), default=tokens)
        present = self.op.attrs["variants"]
        self.op.attrs["variants"] = ({"up_to": most, **asdict(variant)},)
        try:
            return emit_kernel(self.func, self.artifact.target)
        except CompileError:
            return None
        finally:
            self.op.attrs["variants"] = present


def _variant(given: Mapping[str, Any]) -> Variant:
    names: Sequence[str] = tuple(Variant.__dataclass_fields__)
    return Variant(**{name: given[name] for name in names})
