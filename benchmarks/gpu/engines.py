"""What runs an expert layer on the GPU: sparsec, transformers, and peers whose files are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from benchmarks.gpu import ahead
from benchmarks.gpu.device import Device
from benchmarks.shapes import Case, Shape, bank

OURS = "sparsec"
PACKED = {"fp8": (1.0, 0.05), "mxfp4": (0.5 + 1 / 32, 0.25)}
"""Ways to store weights of sparsec besides bf16: bytes of a weight, and the error that rounding them may make."""
GROUPED = "transformers grouped_mm"
COMPILED = "torch.compile grouped_mm"
VLLM_TUNED, VLLM_DEFAULT = "vLLM Triton, tuned", "vLLM Triton, default"
TRITON_KERNELS, LIGER, SCATTERMOE = "triton_kernels", "Liger", "ScatterMoE"
PEERS = (GROUPED, COMPILED, VLLM_TUNED, VLLM_DEFAULT, TRITON_KERNELS, LIGER, SCATTERMOE)

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows [T, H], experts' numbers [T, k], weights [T, k] to rows [T, H]."""


class Missing(Exception):
    """Says in one sentence why an engine cannot be measured here."""


@dataclass(frozen=True)
class Engine:
    """An expert layer, ready to run.

    Args:
        run: without gradients.
        path: which code runs for a number of tokens.
        train: with gradients of x, weights and `banks`; None where it has none, for the reason `untrained`.
        banks: the leaves that `train` reads its weights from.
        prepare: an input in the dtypes that the engine takes, made before the clock starts.
        graph: whether it can be captured as a CUDA graph; others wait for the GPU in the middle.
        compiled: whether torch.compile makes it, which would compile again for another mode of PyTorch.
        worst: largest error of y, of the norm, against the bf16 weights.
        item: bytes of a weight in memory.
        invariant: whether a row is to have the same bits in any batch, which is then checked.
    """

    run: Layer
    path: Callable[[int], str]
    train: Layer | None = None
    untrained: str = "it has no backward"
    banks: tuple[Tensor, ...] = ()
    prepare: Callable[[Case], tuple[Tensor, Tensor, Tensor]] = lambda case: (case.x, case.ids, case.weights)
    graph: bool = True
    compiled: bool = False
    worst: float = 0.02
    item: float = 2.0
    invariant: bool = False


@dataclass(frozen=True)
class Setting:
    """What engines are made of: `module` holds gate_up_proj [E, 2I, H] and down_proj [E, H, I], bf16, on `device`."""

    shape: Shape
    module: Any
    device: Device
    peers: Path | None = None
    ahead: Path | None = None


def makers(setting: Setting) -> Mapping[str, Callable[[], Engine]]:
    """How to make every engine, by name; each raises Missing where it cannot run here."""
    from benchmarks.gpu.peers import liger, scattermoe, triton_kernels, vllm

    return {
        OURS: partial(ours, setting),
        **{f"{OURS} {kind}": partial(ours, setting, kind) for kind in PACKED},
        GROUPED: partial(grouped_mm, setting),
        COMPILED: partial(compiled, setting),
        VLLM_TUNED: partial(vllm.engine, setting, tuned=True),
        VLLM_DEFAULT: partial(vllm.engine, setting, tuned=False),
        TRITON_KERNELS: partial(triton_kernels.engine, setting),
        LIGER: partial(liger.engine, setting),
        SCATTERMOE: partial(scattermoe.engine, setting),
    }


def ours(setting: Setting, weights: str = "bf16") -> Engine:
    """sparsec: its program for the layer; in training, transformers' layer through torch.compile with its backend."""
    shape, module, device = setting.shape, setting.module, setting.device
    program, choice = ahead.program(shape, module, device, setting.ahead, None if weights == "bf16" else weights)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return program(x, ids, weights)[0]

    if weights in PACKED:
        item, worst = PACKED[weights]
        return Engine(run, choice, untrained="packed weights are not trained", item=item, worst=worst, invariant=True)
    other, banks = trained(module, "grouped_mm")
    train = torch.compile(other, backend=_own_gradients, fullgraph=True, dynamic=True)
    return Engine(run, choice, train, banks=banks, invariant=True)


def _own_gradients(graph: GraphModule, examples: Sequence[Any]) -> Any:
    """sparsec's backend. Raises: Missing where it would leave gradients to PyTorch."""
    from sparsec import backend, training

    if training.is_differentiated(graph, examples) and training.with_banks(graph, list(examples)) is None:
        raise Missing("its backend leaves the gradients of this layer to PyTorch")
    return backend.sparsec(graph, examples)


def grouped_mm(setting: Setting) -> Engine:
    """transformers' layer on torch's grouped matrix multiplication."""
    module, banks = trained(setting.module, "grouped_mm")
    return Engine(without_gradients(module), lambda tokens: "grouped_mm", module, banks=banks)


def compiled(setting: Setting) -> Engine:
    """torch.compile with Inductor of the same."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    module, banks = trained(setting.module, "grouped_mm")
    run = torch.compile(copy.copy(module), dynamic=True)
    train = torch.compile(module, dynamic=True)
    return Engine(without_gradients(run), lambda tokens: "inductor, grouped_mm", train, banks=banks, compiled=True)


def trained(module: Any, implementation: str) -> tuple[Any, tuple[Tensor, Tensor]]:
    """The same layer with another implementation of experts, on leaves that want gradients and share its memory."""
    other = copy.copy(module)
    other._parameters = dict(module._parameters)
    other.config = copy.copy(module.config)
    other.config._experts_implementation = implementation
    other.gate_up_proj, other.down_proj = (
        nn.Parameter(weight.detach(), requires_grad=True) for weight in (module.gate_up_proj, module.down_proj)
    )
    return other, (other.gate_up_proj, other.down_proj)


def without_gradients(layer: Layer) -> Layer:
    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(x, ids, weights)

    return run


def narrow(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Experts' numbers in 32 bits, weights in f32: what most peers take."""
    return case.x, case.ids.int(), case.weights.float()


def gradients(engine: Engine, prepared: tuple[Tensor, Tensor, Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward: y, and the gradients of x, weights and both banks."""
    assert engine.train is not None
    x, ids, weights = prepared
    with torch.enable_grad():
        x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
        y = engine.train(x, ids, weights)
        return y.detach(), *torch.autograd.grad(y, (x, weights, *engine.banks), dy)


def meta_bank(shape: Shape) -> Any:
    """The layer without its weights, for compiling."""
    return bank(shape, "meta")
