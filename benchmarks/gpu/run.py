"""The order of business within a number of minutes: set up and check all shapes side by side, then time one by one."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.cells import Cell, Roof, work
from benchmarks.gpu.crew import Lost, Worker
from benchmarks.shapes import Shape

SETUP = 0.5  #: most of the time that goes to setting up and checking, where kernels of peers are compiled
PATIENCE = 150.0  #: seconds that one step may take: compiling a peer's kernel, a layer by torch.compile
RESTARTS = 8  #: of one shape's worker
RESERVE = 4.0  #: seconds kept for the end
GRACE = 30.0  #: seconds that a step of the last cell may take beyond its time

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is to be measured, and how long that may take.

    Args:
        engines: by name.
        cells: the most important first.
        seconds: for everything.
        rounds: of a cell; its median is of so many times, fewer where `cell_seconds` are up.
    """

    shapes: Sequence[Shape]
    engines: Sequence[str]
    cells: Sequence[Cell]
    seconds: float
    rounds: int = 50
    cell_seconds: float = 12.0


@dataclass
class Desk:
    """What is known of one shape's worker.

    Attributes:
        engines: those that could be made; None before it is set up.
        checked: what `check` answered, by cell.
        lost: engines that took the process with them, by cell, with why.
        gone: why there is no worker any more.
    """

    shape: Shape
    worker: Worker | None = None
    engines: list[str] | None = None
    missing: dict[str, str] = field(default_factory=dict[str, str])
    items: dict[str, float] = field(default_factory=dict[str, float])
    checked: dict[Cell, dict[str, Any]] = field(default_factory=dict[Cell, dict[str, Any]])
    lost: dict[Cell, dict[str, str]] = field(default_factory=dict[Cell, dict[str, str]])
    started: int = 0
    gone: str = ""


class Run:
    """One run of the benchmark.

    Args:
        hire: makes a worker.
        save: called with the results after each cell.
        clock: seconds.
        side_by_side: ask all workers at once while nothing is timed; not where they share a process, in which PyTorch
            can compile on one thread only.
    """

    def __init__(
        self,
        settings: Settings,
        hire: Callable[[], Worker],
        save: Callable[[Row], None] = lambda results: None,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = print,
        side_by_side: bool = True,
    ) -> None:
        self.settings, self.hire, self.save, self.clock, self.say = settings, hire, save, clock, say
        self.side_by_side = side_by_side
        self.began = clock()
        self.desks = {shape.name: Desk(shape) for shape in settings.shapes}
        self.results: Row = {
            "format": 1,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "settings": {"minutes": settings.seconds / 60, "rounds": settings.rounds, "dtype": "bf16"},
            "engines": list(settings.engines),
            "roofs": [],
            "rows": [],
            "missing": {},
        }

    def left(self) -> float:
        """Seconds."""
        return self.settings.seconds - RESERVE - (self.clock() - self.began)

    def go(self, machine: Callable[[Row], Row]) -> Row:
        """Everything; `machine` says what the results tell of the machine, given what the device says of itself."""
        self._roof(machine)
        if self.side_by_side:
            threads = [threading.Thread(target=self._prepare, args=(desk,)) for desk in self.desks.values()]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            for desk in self.desks.values():
                self._prepare(desk)
        self.say(f"set up and checked in {self.clock() - self.began:.0f} s")
        self._keep()
        for cell in self.settings.cells:
            row = self._cell(cell)
            self.results["rows"].append(row)
            self._keep()
        for desk in self.desks.values():
            self._close(desk)
        if self.left() > 0:
            self._roof(machine)
        self._keep()
        return self.results

    def _roof(self, machine: Callable[[Row], Row]) -> None:
        """Measure what the machine can do, in a process of its own; the best of all counts."""
        worker = self.hire()
        try:
            found = worker.ask({"do": "describe"}, PATIENCE)
            self.results["machine"] = machine(found)
            roof = worker.ask({"do": "roof"}, PATIENCE)
            if "error" in roof:
                self.results["missing"]["roof"] = roof["error"]
            else:
                self.results["roofs"].append({name: round(rate, 3) for name, rate in roof.items()})
        except Lost as error:
            self.results["missing"]["roof"] = str(error)
        finally:
            worker.close()

    def _prepare(self, desk: Desk) -> None:
        """Set up a shape and check its cells, until all are or half of the time is over."""
        end = self.began + SETUP * self.settings.seconds
        mine = [cell for cell in self.settings.cells if cell.shape == desk.shape.name]
        for cell in mine:
            if desk.gone or self.clock() > end:
                return
            self._check(desk, cell)

    def _check(self, desk: Desk, cell: Cell) -> None:
        """Check one cell; engines that kill the worker are left out of it at the next try."""
        while not desk.gone and cell not in desk.checked and self._ready(desk):
            lost = desk.lost.setdefault(cell, {})
            assert desk.worker is not None
            try:
                command = {"do": "check", "cell": cell.json(), "without": list(lost)}
                answer = desk.worker.ask(command, min(PATIENCE, max(10.0, self.left())))
            except Lost as error:
                lost[error.at] = str(error)
                self._lose(desk, error)
                continue
            desk.checked[cell] = answer
            self.say(f"  {cell}: {_said(answer)}")

    def _ready(self, desk: Desk) -> bool:
        """Whether the desk has a worker that is set up; hires one if not."""
        while desk.worker is None and not desk.gone:
            desk.started += 1
            if desk.started > RESTARTS:
                desk.gone = "its process died too often: " + "; ".join(
                    dict.fromkeys(why for lost in desk.lost.values() for why in lost.values())
                )
                break
            desk.worker = self.hire()
            names = [name for name in self.settings.engines if name not in desk.missing]
            try:
                command = {"do": "set up", "shape": desk.shape.name, "engines": names}
                answer = desk.worker.ask(command, min(PATIENCE, max(10.0, self.left())))
            except Lost as error:
                self._close(desk)
                desk.missing[error.at] = str(error)
                continue
            if "error" in answer:
                desk.gone = answer["error"]
                self._close(desk)
                break
            desk.engines, desk.items = answer["engines"], answer["items"]
            desk.missing |= answer["missing"]
            self.say(f"  {desk.shape}: {', '.join(answer['engines'])}")
        return desk.worker is not None

    def _cell(self, cell: Cell) -> Row:
        """Time one cell. Returns: its row, which says why where nothing was measured."""
        desk = self.desks[cell.shape]
        row: Row = {**cell.json(), "engines": {}, "failed": {}}
        if self.left() <= 0:
            return row | {"not_measured": "the time was up"}
        if _lacked_memory(desk.checked.get(cell)):
            del desk.checked[cell]  # others had it while all were checked side by side
        self._check(desk, cell)
        checked = desk.checked.get(cell)
        if checked is None or "error" in checked:
            return row | {"not_measured": desk.gone or (checked or {}).get("error") or "the time was up"}
        row |= {"invariant": checked["invariant"], "failed": checked["failed"] | desk.lost.get(cell, {})}
        names = self._right(desk, checked, row)
        if not names or not self._ready(desk) or self.left() <= 0:
            return row | {"not_measured": desk.gone or ("no engine is right" if not names else "the time was up")}
        assert desk.worker is not None
        seconds = min(self.settings.cell_seconds, self.left())
        command = {"do": "time", "cell": cell.json(), "engines": self._right(desk, checked, row), "seconds": seconds}
        try:
            answer = desk.worker.ask(command | {"rounds": self.settings.rounds}, min(PATIENCE, self.left() + GRACE))
        except Lost as error:
            desk.lost.setdefault(cell, {})[error.at] = str(error)
            self._lose(desk, error)
            # The others' turn, unless nobody knows who it was.
            return self._cell(cell) if error.at in names else row | {"not_measured": str(error)}
        if "error" in answer:
            return row | {"not_measured": answer["error"]}
        row["failed"] |= answer["failed"]
        row |= {name: answer[name] for name in ("engines", "experts_hit", "launches") if name in answer}
        for name, figures in row["engines"].items():
            figures["error"] = max(checked["errors"][name].values())
            figures["item"] = desk.items.get(name, 2.0)
        self.say(
            f"  {cell}: " + ", ".join(f"{name} {found['median']:.3f} ms" for name, found in row["engines"].items())
        )
        return row

    @staticmethod
    def _right(desk: Desk, checked: Row, row: Row) -> list[str]:
        """The engines that are there and were right in a cell."""
        return [name for name in desk.engines or () if name in checked["errors"] and name not in row["failed"]]

    def _lose(self, desk: Desk, error: Lost) -> None:
        """Let go of a dead worker; an engine that took it along in a second cell is not made again."""
        self._close(desk)
        if error.at in (desk.engines or ()) and sum(error.at in lost for lost in desk.lost.values()) > 1:
            desk.missing[error.at] = f"it took its process along twice: {error}"

    def _close(self, desk: Desk) -> None:
        if desk.worker is not None:
            desk.worker.close()
            desk.worker = None

    def _keep(self) -> None:
        """Bring the shares of the roof up to date and save."""
        for desk in self.desks.values():
            if desk.missing or desk.gone:
                self.results["missing"][desk.shape.name] = desk.missing | ({"all": desk.gone} if desk.gone else {})
        set_roofs(self.results)
        self.save(self.results)


def set_roofs(results: Row) -> None:
    """Say of every time what the machine would allow, by the best of its measured roofs."""
    if not results["roofs"]:
        return
    roof = Roof(*(max(found[rate] for found in results["roofs"]) for rate in ("tbps", "tflops")))
    for row in results["rows"]:
        cell = Cell(*(row[key] for key in ("shape", "tokens", "routing", "mode")))
        for figures in row["engines"].values():
            least = work(Shape.parse(cell.shape), cell, row["experts_hit"], figures["item"])
            ms, limiter = roof.least(least)
            figures |= {
                "roof_ms": round(ms, 4),
                "limiter": limiter,
                "tbps": round(least.bytes / figures["median"] / 1e9, 3),
                "tflops": round(least.flops / figures["median"] / 1e9, 1),
            }


def _lacked_memory(checked: dict[str, Any] | None) -> bool:
    said = [(checked or {}).get("error", ""), *(checked or {}).get("failed", {}).values()]
    return any("out of memory" in why for why in said)


def _said(answer: dict[str, Any]) -> str:
    if "error" in answer:
        return str(answer["error"])
    right = [name for name in answer["errors"] if name not in answer["failed"]]
    wrong = [f"{name}: {why}" for name, why in answer["failed"].items()]
    return "; ".join([f"right: {', '.join(right) or 'none'}", *wrong])
