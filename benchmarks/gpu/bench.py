"""Checks and times the engines of one shape: what a worker does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures import one_line, spread
from benchmarks.gpu.cells import Cell, in_turn
from benchmarks.gpu.device import Replay, gaps
from benchmarks.gpu.engines import OURS, Engine, Setting, gradients, makers
from benchmarks.shapes import Case, bank, cases, reference

CHECKED_ROWS = 128  #: of the output, compared with f64
WORST_TRAINED = 0.04  #: largest error of a gradient, of the norm
GRADIENTS = ("y", "dx", "dweights", "dgate_up", "ddown")
FEWEST = 5  #: rounds of a cell, whatever they take

Say = Callable[[str], None]


class Bench:
    """The engines of one shape.

    Args:
        setting: its module is made here where it is None.
        names: the engines to make.
        say: told the name of each engine before it runs, so that one that never comes back is known.
    """

    def __init__(self, setting: Setting, names: Sequence[str], say: Say = lambda name: None) -> None:
        self.shape, self.device, self.say = setting.shape, setting.device, say
        self.module = setting.module if setting.module is not None else bank(setting.shape, setting.device.torch)
        made = Setting(setting.shape, self.module, setting.device, setting.peers, setting.ahead)
        self.engines, self.missing = dict[str, Engine](), dict[str, str]()
        self._makers = {name: make for name, make in makers(made).items() if name in names}
        self._dropped = dict[str, str]()
        for name, make in self._makers.items():
            say(name)
            try:
                self.engines[name] = make()
            except Exception as error:  # whatever a peer raises: it is told
                self.missing[name] = one_line(error)

    def check(self, cell: Cell, without: Sequence[str] = ()) -> dict[str, Any]:
        """Errors against f64 by engine, which fail and why, and whether a row's bits depend on its batch."""
        case = self._cases(cell)[0]
        answer: dict[str, Any] = {"experts_hit": case.hit, "errors": {}, "failed": {}, "invariant": {}}
        self._hold(cell)
        right = self._right(cell, case)
        answer["failed"] |= self._dropped
        for name, engine in self.engines.items():
            if name in without:
                continue
            self.say(name)
            try:
                error = self._error(cell, engine, case, right)
                answer["errors"][name] = error
                limit = engine.worst if cell.mode == "forward" else WORST_TRAINED
                worst = max(error.values())
                if not worst <= limit:
                    answer["failed"][name] = f"wrong: error {worst:.2%} of the norm ({_first_beyond(error, limit)})"
                elif cell.mode == "forward" and engine.invariant:
                    answer["invariant"][name] = self._invariant(cell, engine, case)
            except Exception as error:  # whatever it raises: its figures are missing, no others
                answer["failed"][name] = one_line(error)
            finally:
                self.device.clear()
        return answer

    def time(self, cell: Cell, names: Sequence[str], seconds: float, rounds: int) -> dict[str, Any]:
        """Milliseconds of one layer by engine, of at most `rounds` rounds within about `seconds`."""
        began = time.perf_counter()
        self._hold(cell)
        inputs = self._cases(cell)
        ready, answer = dict[str, Replay](), dict[str, Any]()
        kept, graph = dict[str, list[Any]](), dict[str, bool]()
        figures, failed = dict[str, Any](), {name: why for name, why in self._dropped.items() if name in names}
        # The gradients of a large layer fit once: graphs of training leave them all in one place.
        pool = self.device.pool() if cell.mode == "training" else None
        for name in names:
            if name in failed:
                continue
            self.say(name)
            engine = self.engines[name]
            try:
                run = self._run(cell, engine, inputs, kept.setdefault(name, []))
                ready[name], graph[name] = self._replay(run, engine, pool)
                self.device.milliseconds(ready[name])
            except Exception as error:  # the same: the others are timed
                ready.pop(name, None)
                failed[name] = one_line(error)
                self.device.clear()  # fails at once, at this engine, where the device is lost
        self.say("rounds")
        taken: dict[str, list[float]] = {name: [] for name in ready}
        for turn, order in in_turn(list(ready), rounds):
            if turn >= FEWEST and time.perf_counter() - began > seconds:
                break
            for name in order:
                try:
                    if name not in failed:
                        taken[name].append(self.device.milliseconds(ready[name]) / cell.calls)
                except Exception as error:  # the same, in the middle of its rounds
                    failed[name] = one_line(error)
                    self.say(name)
                    self.device.clear()
                    self.say("rounds")
        for name in [name for name in ready if name not in failed]:
            engine = self.engines[name]
            if cell.mode == "forward" and not self._same(engine, inputs, kept[name]):
                failed[name] = "its graph gives other numbers than its call"
            else:
                figures[name] = spread(taken[name]) | {"path": engine.path(cell.tokens), "graph": graph[name]}
        if OURS in figures:
            self.say("launches")
            answer["launches"] = gaps(self.device.launches(ready[OURS]))
        ready.clear()
        kept.clear()
        self.device.clear()
        hit = sum(case.hit for case in inputs) / len(inputs)
        return answer | {"engines": figures, "failed": failed, "experts_hit": round(hit, 2)}

    def _hold(self, cell: Cell) -> None:
        """Hold the engines that a cell is for: those without gradients, which may have weights of their own, are let go
        while gradients are made, since these take as much memory as the weights."""
        if cell.mode == "forward":
            for name in [*self._dropped]:
                self.say(name)
                try:
                    self.engines[name] = self._makers[name]()
                    del self._dropped[name]
                except Exception as error:  # no memory, say: it is told, and the next cell tries again
                    self._dropped[name] = one_line(error)
            return
        self._dropped |= {name: engine.untrained for name, engine in self.engines.items() if engine.train is None}
        self.engines = {name: engine for name, engine in self.engines.items() if engine.train is not None}
        self.device.clear()

    def _cases(self, cell: Cell) -> list[Case]:
        return cases(self.shape, cell.tokens, cell.routing, cell.calls, cell.tokens, self.device.torch)

    def _run(self, cell: Cell, engine: Engine, inputs: Sequence[Case], kept: list[Any]) -> Replay:
        """All layers of a cell in a row; `kept` holds what the last run gave, which is where a graph writes."""
        prepared = [engine.prepare(case) for case in inputs]
        dys = [_dy(case) for case in inputs] if cell.mode == "training" else []

        def run() -> None:
            kept.clear()
            if cell.mode == "forward":
                kept.extend(engine.run(*each) for each in prepared)
            for each, dy in zip(prepared, dys, strict=False):
                gradients(engine, each, dy)

        return run

    def _replay(self, run: Replay, engine: Engine, pool: Any) -> tuple[Replay, bool]:
        """A graph where that can be, else the call itself; and which it is."""
        if engine.graph:
            try:
                return self.device.capture(run, pool), True
            except RuntimeError:  # something waits for the GPU after all
                self.device.clear()
        for _ in range(2):
            run()
        return run, False

    def _same(self, engine: Engine, inputs: Sequence[Case], kept: Sequence[Tensor]) -> bool:
        """Whether what the last replay left is what a plain call gives."""
        got, wanted = kept[-1].float(), engine.run(*engine.prepare(inputs[-1])).float()
        return bool((got - wanted).norm() <= 0.01 * wanted.norm())

    def _right(self, cell: Cell, case: Case) -> dict[str, Tensor]:
        """Some rows of y, and in training of the gradients of x and weights, in f64; with the rows' numbers."""
        made = torch.Generator(self.device.torch).manual_seed(1)
        rows = torch.randperm(cell.tokens, generator=made, device=self.device.torch)[:CHECKED_ROWS]
        if cell.mode == "forward":
            with torch.no_grad():
                return {"rows": rows, "y": reference(self.module, case, rows, torch.float64)}
        x, weights = (value.double().requires_grad_() for value in (case.x, case.weights))
        with torch.enable_grad():
            y = reference(self.module, Case(x, case.ids, weights), rows, torch.float64)
            dx, dweights = torch.autograd.grad(y, (x, weights), _dy(case)[rows].double())
        expert = case.ids[0, 0]
        return {
            "rows": rows, "y": y.detach(), "dx": dx[rows], "dweights": dweights[rows], "expert": expert,
            **dict(zip(GRADIENTS[3:], self._bank_gradients(case, int(expert)), strict=True)),
        }  # fmt: skip

    def _bank_gradients(self, case: Case, expert: int) -> tuple[Tensor, ...]:
        """Of one expert's two weights, in f64."""
        tokens, slots = (case.ids == expert).nonzero(as_tuple=True)
        banks = self.module.gate_up_proj, self.module.down_proj
        up, down = (bank.detach()[expert].double().requires_grad_() for bank in banks)
        with torch.enable_grad():
            gate, linear = torch.nn.functional.linear(case.x[tokens].double(), up).chunk(2, -1)
            rows = torch.nn.functional.linear(torch.nn.functional.silu(gate) * linear, down)
            y = rows * case.weights[tokens, slots, None].double()
            return torch.autograd.grad(y, (up, down), _dy(case)[tokens].double())

    def _error(self, cell: Cell, engine: Engine, case: Case, right: dict[str, Tensor]) -> dict[str, float]:
        """Of each result, relative to the norm. Raises: RuntimeError where a number was never written."""
        rows = right["rows"]
        with self.device.poisoned(everywhere=not engine.compiled and cell.mode == "forward"):
            if cell.mode == "forward":
                got = {"y": engine.run(*engine.prepare(case))}
            else:
                got = dict(zip(GRADIENTS, gradients(engine, engine.prepare(case), _dy(case)), strict=True))
        errors = dict[str, float]()
        for name, value in got.items():
            if not bool(value.isfinite().all()):
                raise RuntimeError(f"{name} holds {int((~value.isfinite()).sum())} numbers that are not finite")
            part = value[right["expert"]] if name in GRADIENTS[3:] else value[rows]
            wanted = right[name]
            errors[name] = float(f"{((part.double() - wanted).norm() / wanted.norm()).item():.3g}")
        return errors

    def _invariant(self, cell: Cell, engine: Engine, case: Case) -> bool:
        """Whether rows have the same bits alone, in this batch, and in one of another size."""
        few = torch.arange(min(cell.tokens, 3), device=self.device.torch) * (cell.tokens // 3 or 1)
        few = few.clamp(max=cell.tokens - 1)
        whole = engine.run(*engine.prepare(case))[few]
        alone = engine.run(*engine.prepare(_rows(case, few[:1])))
        size = 37 if cell.tokens > 64 else 300
        (other,) = cases(self.shape, size, "uniform", 1, 7, self.device.torch)
        at = torch.arange(len(few), device=self.device.torch) + size // 2
        for mine, theirs in ((other.x, case.x), (other.ids, case.ids), (other.weights, case.weights)):
            mine[at] = theirs[few]
        among = engine.run(*engine.prepare(other))[at]
        return torch.equal(whole[:1], alone) and torch.equal(whole, among)


def _rows(case: Case, rows: Tensor) -> Case:
    return Case(case.x[rows], case.ids[rows], case.weights[rows])


def _dy(case: Case) -> Tensor:
    """The gradient of y: like x, but not it."""
    return case.x.roll(1, 0).flip(1)


def _first_beyond(errors: dict[str, float], limit: float) -> str:
    return next(name for name, error in errors.items() if not error <= limit)
