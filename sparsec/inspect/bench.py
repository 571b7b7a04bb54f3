"""Times the kernels of a dump from the dump's own files, on this machine: `python bench.py --bench KERNEL`.

Operands are made up: uniform routing, random numbers of the right types. Rates count what the op itself has to move and
compute (`sparsec.inspect.costs`), so what a kernel does twice lowers them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sparsec.diagnostics import SparsecError
from sparsec.dialects.moe.references import group_reference, tiles_reference
from sparsec.ir.core import Func, Value
from sparsec.ir.opdef import OpDef
from sparsec.ir.parser import parse_module
from sparsec.runtime import plan_json
from sparsec.runtime.backends import bind
from sparsec.runtime.context import Context
from sparsec.runtime.dims import compile_dim
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.gpu_driver import architecture
from sparsec.runtime.plan import Kernel

SECONDS = 0.3
"""For how long one kernel is run, at least three times."""


@dataclass(frozen=True)
class Timing:
    """One kernel at one number of tokens; `ran` says by whom, `us` is the median in microseconds."""

    kernel: str
    op: str
    ran: str
    tokens: int
    us: float
    gigabytes_per_second: float
    teraflops: float


def main(folder: Path) -> None:
    """The command line of `bench.py` in a run of a dump."""
    parser = argparse.ArgumentParser(description="Times the kernels of this run on this machine.")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="Which; default: all.")
    parser.add_argument("--bench", nargs="+", action="extend", default=[], metavar="KERNEL", help="The same.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128], metavar="N")
    parser.add_argument("--json", action="store_true", help="One JSON object a line.")
    options = parser.parse_args()
    try:
        for timing in bench(folder, [*options.kernels, *options.bench], options.tokens):
            print(json.dumps(asdict(timing)) if options.json else _line(timing), flush=True)
    except (SparsecError, ArtifactError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def bench(folder: Path, names: Sequence[str] = (), tokens: Sequence[int] = (1, 16, 128)) -> Iterator[Timing]:
    """Time kernels of a run of a dump.

    Args:
        folder: the run.
        names: which kernels, by name or by file (`kernels/gather_gemm_0.py`); none means all.
        tokens: how many of them each gets.

    Raises: SparsecError for a kernel that there is not, or that this machine cannot run; ArtifactError for a damaged
        file.
    """
    if min(tokens, default=1) < 1:
        raise SparsecError(f"a kernel needs at least one token, not {min(tokens)}")
    try:
        plan = plan_json.from_json(json.loads((folder / "plan.json").read_text()))
        passes = json.loads((folder / "manifest.json").read_text())["passes"]
        text = next(entry["file"] for entry in reversed(passes) if "file" in entry)
        module = parse_module((folder / Path(text).name).read_text(), text)
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise SparsecError(f"{folder} is no finished run of a dump: {error}") from error
    wanted = [Path(name).stem for name in names] or list(plan.kernels)
    if unknown := [name for name in wanted if name not in plan.kernels or name not in module.funcs]:
        raise SparsecError(f"there is no kernel '{unknown[0]}' (there are: {', '.join(plan.kernels)})")
    files = _Files(folder)
    for name in wanted:
        kernel = plan.kernels[name]
        device = _device(kernel, str(module.attrs.get("target", "cpu")))
        for count in tokens if isinstance(kernel.tokens, str) else [kernel.tokens]:
            yield _time(module.funcs[name], kernel, files, device, count)


class _Files(dict[str, bytes]):
    """Files of a run by their names under `kernels/`, read when asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and ".." not in Path(name).parts and (self.folder / name).is_file()

    def __missing__(self, name: str) -> bytes:
        self[name] = (self.folder / name).read_bytes()
        return self[name]


def _device(kernel: Kernel, target: str) -> torch.device:
    """Where a kernel runs. Raises: SparsecError if that is not here."""
    if target == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SparsecError(f"kernel '{kernel.name}' is compiled for {target}, and this machine has no GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    if (found := architecture(device)) != target:
        raise SparsecError(f"kernel '{kernel.name}' is compiled for {target}, the GPU here is {found}")
    return device


def _time(func: Func, kernel: Kernel, files: Mapping[str, bytes], device: torch.device, tokens: int) -> Timing:
    op = func.body.ops[0]
    assert isinstance(op, OpDef)
    env = {str(kernel.tokens): tokens}
    given = operands(op, env, device)
    context = Context(device, files, lambda slot: given[slot])
    call = bind(kernel, list(range(len(given))), context)
    us = _median(lambda: call(given), device)
    cost = op.cost(env)
    moved, computed = (cost.bytes, cost.flops) if cost is not None else (0, 0)
    ran = str(context.paths.get(kernel.name, kernel.backend))
    return Timing(kernel.name, kernel.op, ran, tokens, us, moved / us / 1e3, computed / us / 1e6)


def operands(op: OpDef, env: Mapping[str, int], device: torch.device) -> list[Tensor | None]:
    """Made-up operands of a fused op, laid flat, holes included.

    Args:
        env: the sizes that are known only at run time.
    """
    generator = torch.Generator().manual_seed(0)
    known = _routing(op, env, generator)
    found = list[Tensor | None]()
    for argument in op.arguments:
        for value in argument if isinstance(argument, tuple) else (argument,):
            if value is None:
                found.append(None)
                continue
            made = known[value] if value in known else _random(value, env, generator)
            found.append(made.to(device))
    return found


def _routing(op: OpDef, env: Mapping[str, int], generator: torch.Generator) -> dict[Value, Tensor]:
    """The operands that say which token goes to which expert."""
    named: dict[str, Any] = {name: getattr(op, name, None) for name in ("ids", "order", "offsets", "tiles")}
    of: dict[str, Value] = {name: value for name, value in named.items() if isinstance(value, Value)}
    of = {name: value for name, value in of.items() if value in op.operands}
    if "ids" in of:
        tokens, k = _shape(of["ids"], env)
        experts = int(cast("Any", op).num_experts)  # every op with ids has it
    elif "offsets" in of:
        experts = _shape(of["offsets"], env)[0] - 1
        tokens = next(iter(env.values()))
        k = _shape(of["order"], env)[0] // tokens
    else:
        return {}
    ids = torch.rand(tokens, experts, generator=generator).topk(k).indices
    order, offsets = group_reference(ids, experts)
    made = {"ids": ids, "order": order, "offsets": offsets}
    if "tiles" in of:
        made["tiles"] = tiles_reference(offsets, len(order))
    return {value: made[name].to(DTYPES[value.tensor.dtype.value]) for name, value in of.items()}


def _shape(value: Value, env: Mapping[str, int]) -> tuple[int, ...]:
    sizes = (compile_dim(dim if isinstance(dim, int) else str(dim)) for dim in value.tensor.shape)
    return tuple(size if isinstance(size, int) else size(env) for size in sizes)


def _random(value: Value, env: Mapping[str, int], generator: torch.Generator) -> Tensor:
    shape, dtype = _shape(value, env), DTYPES[value.tensor.dtype.value]
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.randn(shape, generator=generator).mul_(0.02).to(dtype)
    if dtype.is_floating_point:  # bytes whose numbers are finite
        return torch.randint(0, 64, shape, dtype=torch.uint8, generator=generator).view(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 8, shape, generator=generator).to(dtype)


def _median(call: Callable[[], Any], device: torch.device) -> float:
    """Microseconds of one call, the first not counted."""

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    settle()
    times, end = list[float](), time.perf_counter() + SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        settle()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def _line(t: Timing) -> str:
    rates = f"{t.gigabytes_per_second:9.2f} GB/s {t.teraflops:9.4f} TFLOP/s"
    return f"{t.kernel:24} {t.tokens:6} tokens {t.us:10.1f} us {rates}   {t.op} by {t.ran}"
