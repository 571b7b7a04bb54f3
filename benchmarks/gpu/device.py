"""The one place that talks to the GPU: graphs, times, launches, roofs. Everything else runs on any device."""

from __future__ import annotations

import gc
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.utils.deterministic

Replay = Callable[[], object]


@dataclass(frozen=True)
class Launched:
    """One kernel of a graph as it ran; microseconds."""

    name: str
    start: float
    end: float


class Device(Protocol):
    """Where engines run.

    Attributes:
        torch: the device of tensors.
        target: what sparsec compiles for.
    """

    torch: torch.device
    target: str

    def describe(self) -> dict[str, Any]:
        """Name, memory, clocks."""
        ...

    def pool(self) -> Any:
        """Memory for several graphs none of which keeps what it leaves."""
        ...

    def capture(self, run: Replay, pool: Any = None) -> Replay:
        """`run` as a graph, in memory of its own or of a `pool`. Raises: RuntimeError for what cannot be one."""
        ...

    def milliseconds(self, replay: Replay) -> float:
        """Of one replay, the cache cold."""
        ...

    def launches(self, replay: Replay) -> list[Launched]:
        """The kernels of one replay in their order; none where that cannot be seen."""
        ...

    def roof(self) -> tuple[float, float]:
        """(TB/s of a copy, TFLOP/s of a matmul)."""
        ...

    def poisoned(self, *, everywhere: bool) -> AbstractContextManager[None]:
        """Within it fresh buffers hold NaN, so that a number that nobody writes shows.

        `everywhere`: also those that the allocator has at hand already, and integers (the largest there is).
        """
        ...

    def clear(self) -> None:
        """Give memory back that nothing uses."""
        ...


class Gpu:
    """A CUDA device."""

    def __init__(self, index: int = 0) -> None:
        from sparsec.runtime.gpu_driver import architecture

        torch.cuda.set_device(index)
        self.torch = torch.device("cuda", index)
        self.target = architecture(self.torch)
        cache = int(getattr(torch.cuda.get_device_properties(index), "L2_cache_size", 64 << 20))
        self._other = torch.zeros(cache, dtype=torch.float32, device=self.torch)  # four times the cache
        self._sum = torch.empty((), device=self.torch)
        self._stream = torch.cuda.Stream(self.torch)  # one for all graphs: memory is used again by its own stream only
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def describe(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(self.torch)
        return {
            "chip": found.name,
            "target": self.target,
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "cache_mib": self._other.numel() >> 20,
            **_smi(),
        }

    def pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, run: Replay, pool: Any = None) -> Replay:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # what is set up at a first call is not part of a graph
                run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                run()
        finally:
            torch.cuda.set_stream(before)  # where PyTorch does not come back from a capture that failed
        return graph.replay

    def milliseconds(self, replay: Replay) -> float:
        # Takes longer than it takes to send what follows. Lines that were read are dropped at once; lines that were
        # written would go back to memory while the clock runs.
        torch.sum(self._other, (0,), out=self._sum)
        self._begin.record()
        replay()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end)

    def launches(self, replay: Replay) -> list[Launched]:
        from torch.profiler import ProfilerActivity, profile

        times = 3
        replay()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(times):
                replay()
                torch.cuda.synchronize()
        found = [
            Launched(event.name, float(event.time_range.start), float(event.time_range.end))
            for event in seen.events() or ()
            if event.device_type.name == "CUDA" and event.time_range.end > event.time_range.start
        ]
        found.sort(key=lambda kernel: kernel.start)
        return found[-(len(found) // times) :] if found and len(found) % times == 0 else []

    def roof(self) -> tuple[float, float]:
        rates = self._copied(), self._multiplied()
        self.clear()
        return rates

    def _copied(self) -> float:
        """TB/s, of bytes read and written."""
        free, _ = torch.cuda.mem_get_info(self.torch)
        size = min(4 << 30, free // 4)
        source, sink = (torch.zeros(size, dtype=torch.uint8, device=self.torch) for _ in range(2))
        return 2 * size / self._median(lambda: sink.copy_(source)) / 1e9

    def _multiplied(self, side: int = 8192) -> float:
        """TFLOP/s, of bf16 random numbers."""
        left, right = (torch.randn(side, side, device=self.torch).bfloat16() for _ in range(2))
        return 2 * side**3 / self._median(lambda: left @ right) / 1e9

    @contextmanager
    def poisoned(self, *, everywhere: bool) -> Iterator[None]:
        self.clear()
        free, _ = torch.cuda.mem_get_info(self.torch)
        sizes = [1 << 20] * 64 + [min(free // 8, 4 << 30)]
        full = [torch.full((size // 4,), math.nan, device=self.torch) for size in sizes]
        del full  # the allocator hands these blocks out next
        with _filled() if everywhere else nullcontext():
            yield
        torch.cuda.synchronize()

    def clear(self) -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _median(self, run: Replay, count: int = 21) -> float:
        """Milliseconds of one of a few calls in a row."""
        for _ in range(3):
            run()
        return statistics.median(self.milliseconds(run) for _ in range(count))


class Rehearsal:
    """The processor in a GPU's place, for tests of everything else; what it measures means nothing."""

    def __init__(self) -> None:
        self.torch, self.target = torch.device("cpu"), "cpu"
        torch.set_num_threads(1)

    def describe(self) -> dict[str, Any]:
        return {"chip": "Rehearsal", "target": self.target}

    def pool(self) -> Any:
        return None

    def capture(self, run: Replay, pool: Any = None) -> Replay:
        run()
        return run

    def milliseconds(self, replay: Replay) -> float:
        start = time.perf_counter()
        replay()
        return max(1e-3, (time.perf_counter() - start) * 1e3)

    def launches(self, replay: Replay) -> list[Launched]:
        return [Launched("first", 0.0, 2.0), Launched("second", 3.5, 6.0)]

    def roof(self) -> tuple[float, float]:
        return 1.0, 1.0

    def poisoned(self, *, everywhere: bool) -> AbstractContextManager[None]:
        return _filled() if everywhere else nullcontext()

    def clear(self) -> None:
        gc.collect()


def gaps(launched: Sequence[Launched]) -> dict[str, Any] | None:
    """Kernels of a graph, their summed time, and the times between one's end and the next one's start, microseconds.

    A kernel that starts before the last one ended leaves no gap.
    """
    if not launched:
        return None
    between = [max(0.0, after.start - before.end) for before, after in pairwise(launched)]
    return {
        "kernels": len(launched),
        "kernels_us": round(sum(kernel.end - kernel.start for kernel in launched), 2),
        "span_us": round(max(kernel.end for kernel in launched) - launched[0].start, 2),
        "largest_gap_us": round(max(between, default=0.0), 2),
        "median_gap_us": round(statistics.median(between), 2) if between else 0.0,
        "names": list(dict.fromkeys(kernel.name[:80] for kernel in launched)),
    }


@contextmanager
def _filled() -> Iterator[None]:
    """PyTorch itself fills what it allocates."""
    options: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), options.fill_uninitialized_memory
    options.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        options.fill_uninitialized_memory = before[1]


def _smi() -> dict[str, Any]:
    """Driver and clocks, as nvidia-smi says them; {} where it is missing."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}
