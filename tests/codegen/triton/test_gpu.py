"""Compiled kernels on the GPU that is here, through the runtime, against the ops' references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sparsec import pipeline
from sparsec.codegen.emit import emit
from sparsec.codegen.triton.emit import emit_kernel
from sparsec.dialects.moe import gather_gemm_reference, gemm_combine_reference, group_reference
from sparsec.ir.core import Func
from sparsec.ir.equal import clone_module
from sparsec.ir.interp import evaluate_module
from sparsec.ir.types import Sym, TensorType
from sparsec.runtime import gpu_driver
from sparsec.runtime.context import Context
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.executor import Program
from sparsec.runtime.plan import Kernel, Tensor
from sparsec.runtime.triton_kernels import bind
from tests.codegen.layers import LAYERS, inputs
from tests.codegen.triton import build
from tests.codegen.triton.routers import ROUTERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
COUNTS = [0, 1, 5, 16, 17, 64, 65, 300, 2000]


def tensor(type: Any) -> Tensor:
    assert isinstance(type, TensorType)
    return Tensor(tuple(str(dim) if isinstance(dim, Sym) else dim for dim in type.shape), type.dtype.value)


def bound(func: Func) -> Any:
    """A kernel function as the runtime would call it."""
    device = torch.device("cuda", torch.cuda.current_device())
    made, op = emit_kernel(func, gpu_driver.architecture(device)), func.body.ops[0]
    kernel = Kernel(
        func.name, op.name, "triton", tuple(tensor(value.type) for value in op.operands),
        tuple(tensor(value.type) for value in op.results), "t", {}, {}, list(made.variants),
    )  # fmt: skip
    return bind(kernel, range(len(op.operands)), Context(device, made.files, lambda slot: None))


def silu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(a) * b


class SiluEnv:
    """Runs the activation for the reference."""

    def run(self, block: Any, args: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (silu(*args),)


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name: str) -> None:
    router = ROUTERS[name]
    params = [torch.rand(shape) for shape in router.params]
    run = bound(build.route_group(router, torch.randn(5, router.experts).to(router.dtype), *params))
    for tokens in COUNTS:
        logits = torch.randn(tokens, router.experts).to(router.dtype)
        given = [logits, *params]
        ids, weights, order, offsets = (out.cpu() for out in run([item.cuda() for item in given]))
        wanted_ids, wanted_weights = router(*given)
        if router.dtype is torch.float32:
            assert torch.equal(ids.sort(-1).values, wanted_ids.sort(-1).values)
            torch.testing.assert_close(weights.sum(-1), wanted_weights.sum(-1), rtol=1e-5, atol=1e-6)
        wanted_order, wanted_offsets = group_reference(ids, router.experts)
        assert torch.equal(order, wanted_order) and torch.equal(offsets, wanted_offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer(dtype: torch.dtype) -> None:
    """Both GEMMs over every variant; the second run gives the same bits."""
    torch.manual_seed(0)
    hidden, width, experts, k = 256, 96, 16, 4
    first = bound(build.gather_gemm(silu, hidden, width, experts, k, dtype))
    second = bound(build.gemm_combine(hidden, width, experts, k, dtype))
    up = (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(experts, hidden, width) / width**0.5).to(dtype)
    env: Any = SiluEnv()
    for tokens in COUNTS:
        x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, k)
        ids = torch.randint(0, experts + 1, (tokens, k))
        weights[ids == experts] = float("nan")
        order, offsets = group_reference(ids, experts)
        given = [item.cuda() for item in (x, order, offsets, up)]
        (h,) = first(given)
        wide = gather_gemm_reference(
            env, None, "concat", x.float(), order, offsets, up.float(), None, False, k  # type: ignore[arg-type]
        )  # fmt: skip
        used, tolerance = int(offsets[-1]), {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 2e-2)
        torch.testing.assert_close(h[:used].cpu().float(), wide[:used], rtol=tolerance, atol=tolerance)
        rest = [item.cuda() for item in (order, offsets, weights, down)]
        (y,) = second([h, *rest])
        wanted = gemm_combine_reference(h.cpu(), order, offsets, weights, down, None, False, dtype)
        torch.testing.assert_close(y.cpu(), wanted, rtol=tolerance, atol=tolerance)
        assert torch.equal(second([h, *rest])[0], y)


def test_in_a_cuda_graph_and_on_another_stream() -> None:
    run = bound(build.group(16, 2))
    ids = torch.randint(0, 16, (40, 2), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run([ids])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        order, offsets = run([ids])
    ids.copy_(torch.randint(0, 16, (40, 2)))
    graph.replay()
    torch.cuda.synchronize()
    wanted = group_reference(ids.cpu(), 16)
    assert torch.equal(order.cpu(), wanted[0]) and torch.equal(offsets.cpu(), wanted[1])


def test_code_for_another_gpu_is_refused() -> None:
    other = "cuda:sm_80" if gpu_driver.architecture(torch.device("cuda", 0)) != "cuda:sm_80" else "cuda:sm_90"
    func = build.group(4, 2)
    made, op = emit_kernel(func, other), func.body.ops[0]
    kernel = Kernel(
        "group_0", op.name, "triton", (tensor(op.operands[0].type),), tuple(tensor(v.type) for v in op.results), "t",
        {}, {}, list(made.variants),
    )  # fmt: skip
    with pytest.raises(ArtifactError, match=f"compiled for {other}, this GPU is"):
        bind(kernel, [0], Context(torch.device("cuda", 0), made.files, lambda slot: None))


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    """Whole programs: kernels by Triton, what is between them by PyTorch."""
    module = LAYERS[name].module()
    device = torch.device("cuda", torch.cuda.current_device())
    target = gpu_driver.architecture(device)
    emitted = emit(pipeline.run(clone_module(module), target=target).module, target)
    assert not emitted.remarks
    program = Program(emitted.plan, {}, device, files=emitted.files)
    for tokens in COUNTS:
        given = inputs(module, tokens, seed=tokens)
        results = program(*(value.to(device) for value in given))
        for got, wanted in zip(results, evaluate_module(module, given, {}), strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)
