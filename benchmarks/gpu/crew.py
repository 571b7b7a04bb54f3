"""The parent's side of workers: asks, waits no longer than it says, and knows where one was when it died."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from benchmarks.gpu.device import Rehearsal
from benchmarks.gpu.worker import Desk

ROOT = Path(__file__).parents[2]
THREADS = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")  #: a worker for each shape shares the processor


class Lost(Exception):
    """A worker died or did not answer in time.

    Attributes:
        at: the engine that it was at.
    """

    def __init__(self, at: str, why: str) -> None:
        super().__init__(why)
        self.at = at


class Worker(Protocol):
    """One shape's worker."""

    def ask(self, command: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer. Raises: Lost."""
        ...

    def close(self) -> None:
        """Let go of it and its memory."""
        ...


class Process:
    """A worker in a process of its own."""

    def __init__(self, device: str, peers: Path | None, ahead: Path | None) -> None:
        self._errors: Any = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        words = [device, *(str(path.resolve()) if path else "" for path in (peers, ahead))]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.worker", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, encoding="utf-8", cwd=ROOT,
            env=os.environ | {name: "2" for name in THREADS},
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, command: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        at = str(command["do"])
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            while True:
                line = self._lines.get(timeout=max(1.0, seconds))
                if line is None:
                    raise Lost(at, f"the process died at {at}: {self._last_words()}")
                answer = json.loads(line)
                if "at" not in answer:
                    return answer  # type: ignore[no-any-return]
                at = answer["at"]
        except queue.Empty:
            self.close()
            raise Lost(at, f"{at} did not end within {seconds:.0f} s") from None
        except OSError:
            raise Lost(at, f"the process is gone: {self._last_words()}") from None

    def close(self) -> None:
        self._process.kill()
        self._process.wait(timeout=30)

    def _last_words(self) -> str:
        """The last line of what it said, without paths."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit status {self._process.poll()}"
        return re.sub(r"/\S*/", "", said)[:200]


class Inside:
    """A worker in this process, for rehearsals."""

    def __init__(self, peers: Path | None = None, ahead: Path | None = None) -> None:
        self._desk = Desk(Rehearsal(), peers, ahead, lambda name: None)

    def ask(self, command: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        return json.loads(json.dumps(self._desk.answer(command)))  # type: ignore[no-any-return]

    def close(self) -> None:
        self._desk.bench = None
