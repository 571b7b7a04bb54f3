"""One process for one shape: takes commands from its parent as lines of JSON, and answers each with one line.

A kernel that reads beyond its memory takes the process's whole context with it, and one that never ends cannot be
stopped: with a process for each shape the others lose nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.figures import one_line
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cells import Cell
from benchmarks.gpu.device import Device, Gpu, Rehearsal
from benchmarks.gpu.engines import Setting
from benchmarks.shapes import Shape


class Desk:
    """Does what commands say.

    `{"do": "set up", "shape": ..., "engines": [...]}`, `{"do": "check", "cell": {...}, "without": [...]}`,
    `{"do": "time", "cell": {...}, "engines": [...], "seconds": s, "rounds": n}`, `{"do": "roof"}`,
    `{"do": "describe"}`.
    """

    def __init__(self, device: Device, peers: Path | None, ahead: Path | None, say: Any) -> None:
        self.device, self.peers, self.ahead, self.say = device, peers, ahead, say
        self.bench: Bench | None = None

    def answer(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """The answer; `{"error": ...}` where the whole command failed."""
        try:
            return self._do(command)
        except Exception as error:  # the parent writes it down
            self.device.clear()
            return {"error": one_line(error)}

    def _do(self, command: Mapping[str, Any]) -> dict[str, Any]:
        match command["do"]:
            case "set up":
                shape = Shape.parse(command["shape"])
                setting = Setting(shape, None, self.device, self.peers, self.ahead)
                self.bench = Bench(setting, command["engines"], self.say)
                items = {name: engine.item for name, engine in self.bench.engines.items()}
                return {"engines": list(self.bench.engines), "missing": self.bench.missing, "items": items}
            case "check":
                assert self.bench is not None
                return self.bench.check(Cell(**command["cell"]), command["without"])
            case "time":
                assert self.bench is not None
                given = command["engines"], command["seconds"], command["rounds"]
                return self.bench.time(Cell(**command["cell"]), *given)
            case "roof":
                tbps, tflops = self.device.roof()
                return {"tbps": tbps, "tflops": tflops}
            case "describe":
                return self.device.describe()
            case other:
                raise ValueError(f"there is no command '{other}'")


def serve(desk: Desk, commands: IO[str], answers: IO[str]) -> None:
    """Answer until there are no more commands."""
    for line in commands:
        answers.write(json.dumps(desk.answer(json.loads(line))) + "\n")
        answers.flush()


def main(words: list[str]) -> None:
    """`DEVICE PEERS AHEAD`, the latter two possibly empty."""
    device, peers, ahead = words
    # Libraries print what they like; answers have the real standard output to themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.manual_seed(0)

    def say(name: str) -> None:
        answers.write(json.dumps({"at": name}) + "\n")
        answers.flush()

    made = Rehearsal() if device == "rehearsal" else Gpu()
    serve(Desk(made, Path(peers) if peers else None, Path(ahead) if ahead else None, say), sys.stdin, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
