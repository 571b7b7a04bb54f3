"""Compiled kernels on the GPU that is here, through the runtime, against the ops' references.

The `check_*.py` of this folder, which elsewhere run in Triton's interpreter, run on it as `on_gpu` says; here is what
the interpreter cannot show: bf16, tensor maps, launches that start early, graphs, streams, counts that outlive calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from sparsec.dialects.moe import gather_gemm_reference, gemm_combine_reference, group_reference
from sparsec.dialects.moe.references import tiles_reference
from sparsec.runtime import gpu_driver
from sparsec.runtime.context import Context
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.triton_kernels import bind
from tests.codegen.triton import build
from tests.codegen.triton.on_gpu import bound, captured, described, device, poisoned, same_bits
from tests.codegen.triton.routers import ROUTERS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
COUNTS = [0, 1, 5, 16, 17, 64, 65, 300, 2000]
HIDDEN, WIDTH, EXPERTS = 256, 128, 16

UP: dict[str, dict[str, Any]] = {
    "tiles": {"block_m": 64, "block_n": 64, "block_k": 64, "num_stages": 3},
    "tiles of few rows": {"block_m": 16, "block_n": 64, "block_k": 128, "num_stages": 4},
    "swap": {"block_m": 16, "block_n": 64, "block_k": 64, "num_stages": 4},
    "swap of more rows": {"block_m": 64, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 3},
    "tma": {"block_m": 128, "block_n": 64, "block_k": 64, "num_warps": 8, "num_stages": 3},
    "rows": {"block_m": 2, "block_n": 8, "block_k": 256, "num_stages": 4},
    "gathered": {"block_m": 128, "block_n": 64, "block_k": 64, "num_warps": 8, "num_stages": 3},
    "gathered, divided": {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 3},
}
DOWN: dict[str, dict[str, Any]] = {
    **{name: variant for name, variant in UP.items() if name != "rows" and "gathered" not in name},
    "persistent, divided": {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 4, "num_stages": 4},
    "persistent": {"block_m": 64, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 3},
    "rows": {"block_n": 8, "block_k": 64, "num_stages": 4, "up_to": 64},
    "rows, split": {"block_n": 8, "block_k": 64, "num_stages": 4, "split": 2, "up_to": 64},
}
"""One variant of each family and way in it, for both GEMMs; the first word is the family."""
PLAIN = {"kernel": "tiles", "block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 3}
LISTED = ("persistent", "gathered")
"""Families that need a list of tiles; they are for 16-bit numbers."""
SM_90 = ("swap", "tma", *LISTED)


def silu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(a) * b


class SiluEnv:
    """Runs the activation for the reference."""

    def run(self, block: Any, args: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (silu(*args),)


def variants(name: str, sizes: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The variant, and tiles beyond where it does not take every number of tokens. Skips what this GPU has not."""
    if family(name) in SM_90 and (torch.version.hip or torch.cuda.get_device_capability()[0] < 9):
        pytest.skip(f"{name} needs the copy engine of sm_90")
    chosen = {**PLAIN, **sizes, "kernel": family(name)}
    return (chosen, PLAIN) if "up_to" in chosen else (chosen,)


def routed(tokens: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Experts' numbers with some that are skipped, and how they are grouped."""
    ids = torch.rand(tokens, EXPERTS + 1).argsort(-1)[:, :k]
    return ids, *group_reference(ids, EXPERTS)


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 2e-2)


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


def family(name: str) -> str:
    return name.split(maxsplit=1)[0].rstrip(",")


def up_kernel(name: str, dtype: torch.dtype, k: int) -> Callable[..., torch.Tensor]:
    """An up-projection of x, order, offsets and the bank, all on the GPU. Skips what there is not."""
    listed = family(name) in LISTED
    if listed and dtype is torch.float32:
        pytest.skip(f"{name} is for 16-bit numbers")
    chosen = variants(name, UP[name])
    run = bound(build.gather_gemm(silu, HIDDEN, WIDTH, EXPERTS, k, dtype, variants=chosen, listed=listed))

    def call(x: torch.Tensor, order: torch.Tensor, offsets: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        tiles = [None, None, None, tiles_reference(offsets.cpu(), len(order)).cuda()] if listed else []
        (h,) = run([x, order, offsets, bank, *tiles])
        return h

    return call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", UP)
def test_up(name: str, dtype: torch.dtype) -> None:
    """Every number of rows, the same bits twice."""
    torch.manual_seed(0)
    k = 4
    run = up_kernel(name, dtype, k)
    up = (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5).to(dtype)
    env: Any = SiluEnv()
    nothing: Any = None
    for tokens in COUNTS:
        x = torch.randn(tokens, HIDDEN).to(dtype)
        _, order, offsets = routed(tokens, k)
        given = [item.cuda() for item in (x, order, offsets, up)]
        with poisoned():
            h, again = run(*given), run(*given)
        same_bits([again], [h])
        wide = gather_gemm_reference(env, nothing, "concat", x.float(), order, offsets, up.float(), None, False, k)
        used = int(offsets[-1])
        torch.testing.assert_close(h[:used].cpu().float(), wide[:used], rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", DOWN)
def test_down(name: str, dtype: torch.dtype, k: int) -> None:
    torch.manual_seed(0)
    listed = family(name) in LISTED
    if listed and dtype is torch.float32:
        pytest.skip(f"{name} is for 16-bit numbers")
    func = build.gemm_combine(HIDDEN, WIDTH, EXPERTS, k, dtype, variants=variants(name, DOWN[name]), listed=listed)
    run = bound(func)
    down = (torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5).to(dtype)
    for tokens in COUNTS:
        ids, order, offsets = routed(tokens, k)
        h, weights = torch.randn(tokens * k, WIDTH).to(dtype), torch.rand(tokens, k)
        weights[ids == EXPERTS] = float("nan")  # a skipped pair adds nothing, whatever its weight
        given: list[Any] = [item.cuda() for item in (h, order, offsets, weights, down)]
        given += [None, None, tiles_reference(offsets, tokens * k).cuda()] if listed else []
        with poisoned():
            (y,), (again,) = run(given), run(given)
        same_bits([again], [y])
        wanted = gemm_combine_reference(h, order, offsets, weights, down, None, False, dtype)
        torch.testing.assert_close(y.cpu(), wanted, rtol=tolerance(dtype), atol=tolerance(dtype))


@pytest.mark.parametrize("name", UP)
def test_a_row_has_the_same_bits_in_any_batch(name: str) -> None:
    torch.manual_seed(0)
    k, dtype = 4, torch.bfloat16
    run = up_kernel(name, dtype, k)
    up = (torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5).to(dtype).cuda()
    x, ids = torch.randn(500, HIDDEN).to(dtype), torch.rand(500, EXPERTS).argsort(-1)[:, :k]

    def of_pairs(tokens: int) -> torch.Tensor:
        order, offsets = group_reference(ids[:tokens], EXPERTS)
        return run(x[:tokens].cuda(), order.cuda(), offsets.cuda(), up).cpu()[order.argsort()]

    many = of_pairs(500)
    for tokens in (1, 3, 40):
        assert torch.equal(of_pairs(tokens), many[: tokens * k])


@pytest.mark.parametrize("tokens", [1, 5, 64, 1500])
def test_launches_that_start_early_do_not_run_ahead(tokens: int) -> None:
    """Group and both GEMMs in one graph, many times: a kernel that reads too soon gives other bits sooner or later."""
    torch.manual_seed(0)
    k, dtype = 4, torch.bfloat16
    group, up, down = (
        bound(func)
        for func in (
            build.group(EXPERTS, k),
            build.gather_gemm(silu, HIDDEN, WIDTH, EXPERTS, k, dtype),
            build.gemm_combine(HIDDEN, WIDTH, EXPERTS, k, dtype),
        )
    )
    banks = [torch.randn(EXPERTS, *shape).to(dtype).cuda() for shape in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH))]
    x, weights = torch.randn(tokens, HIDDEN).to(dtype).cuda(), torch.rand(tokens, k).cuda()
    ids = torch.rand(tokens, EXPERTS + 1).argsort(-1)[:, :k].cuda()

    def layer() -> list[torch.Tensor]:
        results = list[torch.Tensor]()
        for _ in range(4):  # the next layer's first launch may start early too, into memory that is used again
            order, offsets = group([ids])
            (h,) = up([x, order, offsets, banks[0]])
            results += down([h, order, offsets, weights, banks[1]])
        return results

    replay, results = captured(layer)
    for _ in range(50):
        ids.copy_(torch.rand(tokens, EXPERTS + 1).argsort(-1)[:, :k])
        for result in results:
            result.fill_(float("nan"))
        replay()
        torch.cuda.synchronize()
        order, offsets = (value.cuda() for value in group_reference(ids.cpu(), EXPERTS))
        (h,) = up([x, order, offsets, banks[0]])
        torch.cuda.synchronize()
        wanted = down([h, order, offsets, weights, banks[1]])
        for result in results:
            same_bits([result], wanted)


def test_graphs_that_are_replayed_in_another_order_than_captured() -> None:
    """Counts of the last program to arrive are zero for whichever graph comes first."""
    torch.manual_seed(0)
    split = variants("rows, split", DOWN["rows, split"])
    run = bound(build.gemm_combine(HIDDEN, WIDTH, EXPERTS, 4, torch.bfloat16, variants=split))
    down = torch.randn(EXPERTS, HIDDEN, WIDTH).bfloat16().cuda()
    made = list[Any]()
    for tokens in (1, 3):
        _, order, offsets = routed(tokens, 4)
        h, weights = torch.randn(tokens * 4, WIDTH).bfloat16().cuda(), torch.rand(tokens, 4).cuda()
        given = [h, order.cuda(), offsets.cuda(), weights, down]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # on the stream that all graphs are captured on, with no call before
            results = run(given)
        made.append((graph, results, given))
    for graph, results, given in reversed(made):
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            same_bits(results, run(given))


def test_in_a_cuda_graph_and_on_another_stream() -> None:
    run = bound(build.group(EXPERTS, 2))
    ids = torch.randint(0, EXPERTS, (40, 2), device="cuda")
    replay, (order, offsets) = captured(lambda: run([ids]))
    ids.copy_(torch.randint(0, EXPERTS, (40, 2)))
    replay()
    torch.cuda.synchronize()
    wanted = group_reference(ids.cpu(), EXPERTS)
    assert torch.equal(order.cpu(), wanted[0]) and torch.equal(offsets.cpu(), wanted[1])


def test_from_a_thread_that_has_no_context() -> None:
    """As autograd calls backward kernels."""
    from concurrent.futures import ThreadPoolExecutor

    run = bound(build.group(EXPERTS, 2))
    ids = torch.randint(0, EXPERTS, (40, 2), device="cuda")
    with ThreadPoolExecutor(1) as pool:
        order, offsets = pool.submit(lambda: [result.cpu() for result in run([ids])]).result()
    assert torch.equal(order, group_reference(ids.cpu(), EXPERTS)[0]) and int(offsets[-1]) == 80


def test_operands_that_are_not_dense_or_aligned() -> None:
    run = bound(build.group(EXPERTS, 2))
    wide = torch.randint(0, EXPERTS, (41, 5), device="cuda")
    for ids in (wide[:, 1:3], wide.flatten()[1:81].view(40, 2)):
        order, _ = run([ids])
        assert torch.equal(order.cpu(), group_reference(ids.cpu(), EXPERTS)[0])


def test_the_driver_says_what_it_refuses() -> None:
    with pytest.raises(ArtifactError, match=r"(cu|hip)ModuleLoadData failed"):
        gpu_driver.driver().load(b"no image", "no_kernel", 128, 0, device())
    assert ctypes.sizeof(gpu_driver._Config) == 56 and ctypes.sizeof(gpu_driver._Attribute) == 72
    assert int((torch.ones(3, device="cuda") + 1).sum()) == 6  # the context is as it was


def test_code_for_another_gpu_is_refused() -> None:
    other = "cuda:sm_80" if gpu_driver.architecture(device()) != "cuda:sm_80" else "cuda:sm_90"
    kernel, files = described(build.group(4, 2), other)
    with pytest.raises(ArtifactError, match=f"compiled for {other}, this GPU is"):
        bind(kernel, [0], Context(device(), files, lambda slot: None))


def test_layers() -> None:
    """Whole programs of every kind of bank: kernels by Triton, what is between them by PyTorch."""
    pytest.importorskip("lark")  # they are texts
    from sparsec import pipeline
    from sparsec.codegen.emit import emit
    from sparsec.ir.equal import clone_module
    from sparsec.ir.interp import evaluate_module
    from sparsec.runtime.executor import Program
    from tests.codegen.layers import LAYERS, inputs

    target = gpu_driver.architecture(device())
    for layer in LAYERS.values():
        module = layer.module()
        emitted = emit(pipeline.run(clone_module(module), target=target).module, target)
        assert not emitted.remarks
        program = Program(emitted.plan, {}, device(), files=emitted.files)
        for tokens in COUNTS:
            given = inputs(module, tokens, seed=tokens)
            with poisoned():
                results = program(*(value.cuda() for value in given))
            for got, wanted in zip(results, evaluate_module(module, given, {}), strict=True):
                torch.testing.assert_close(got.cpu(), wanted, rtol=1e-4, atol=1e-4)
