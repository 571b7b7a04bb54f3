"""The runtime's launcher on the CPU with programs that only record: grids, arguments, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparsec.runtime import triton_kernels
from sparsec.runtime.context import Context
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.plan import Kernel, Tensor, Variant
from sparsec.runtime.triton_kernels import bind, launcher

CPU = torch.device("cpu")
LAUNCH: dict[str, Any] = {
    "file": "kernels/k.cubin",
    "symbol": "k",
    "grid": ["(t + 3) // 4", "2"],
    "threads": 128,
    "shared": 0,
    "args": [{"in": 0}, {"in": 1}, {"out": 0}, {"scratch": 0}, {"size": "t * 2"}],
}
MAP = {"map": {"in": 1}, "element": "f32", "shape": ["t", 2], "strides": [4, 1], "box": [8, 4], "swizzle": 0}
CONFIG: dict[str, Any] = {"target": "cuda:sm_90", "scratch": ["t * 8"], "launches": [LAUNCH]}


def kernel(**changes: Any) -> Kernel:
    """A kernel with one launch for up to 4 tokens and two beyond."""
    variants = [Variant(4, CONFIG), Variant(None, {**CONFIG, "launches": [LAUNCH, LAUNCH]})]
    made = Kernel(
        "k", "moe.gemm_combine", "triton", (Tensor(("2*t", 3), "f32"), Tensor(("t", 2), "f32")),
        (Tensor(("t", 3), "bf16"),), "t", {}, {}, variants,
    )  # fmt: skip
    return replace(made, **changes)


class Recorder:
    """Stands for a driver: remembers every launch."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, int], list[Any]]] = []

    def load(self, config: Any) -> Any:
        return lambda grid, args: self.launches.append((grid, list(args)))


def run(tokens: int, ins: Sequence[torch.Tensor] | None = None, **changes: Any) -> tuple[Recorder, Any]:
    recorder = Recorder()
    call = launcher(kernel(**changes), CPU, recorder.load)
    return recorder, call(ins or [torch.zeros(2 * tokens, 3), torch.zeros(tokens, 2)])


def test_one_variant_by_token_count() -> None:
    assert [len(run(tokens)[0].launches) for tokens in (1, 4, 5, 9)] == [1, 1, 2, 2]


def test_grid_arguments_and_results() -> None:
    recorder, (out,) = run(6)
    grid, (x, weights, result, scratch, size) = recorder.launches[0]
    assert grid == (2, 2)
    assert x.shape == (12, 3) and weights.shape == (6, 2)
    assert result is out and out.shape == (6, 3) and out.dtype is torch.bfloat16
    assert scratch.numel() * scratch.element_size() == 48
    assert size == 12


def test_an_empty_grid_is_not_launched() -> None:
    recorder, (out,) = run(0)
    assert not recorder.launches
    assert out.shape == (0, 3)


def test_operands_are_made_dense_and_aligned() -> None:
    storage = torch.arange(40.0)
    crooked = storage[1:37].view(12, 3)
    strided = torch.zeros(2, 6).T
    recorder, _ = run(6, [crooked, strided])
    x, weights = recorder.launches[0][1][:2]
    assert x.data_ptr() % 16 == 0 and torch.equal(x, crooked)
    assert weights.is_contiguous()


def test_operand_on_another_device_is_refused() -> None:
    with pytest.raises(InputError, match="operand 1 of kernel 'k' is on meta"):
        run(2, [torch.zeros(4, 3), torch.zeros(2, 2, device="meta")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"args": [{"in": 2}]}, "names nothing"),
        ({"args": [{"out": -1}]}, "names nothing"),
        ({"args": [{"scratch": 1}]}, "names nothing"),
        ({"args": [{"in": 0, "out": 0}]}, "names nothing"),
        ({"args": [{"in": True}]}, "names nothing"),
        ({"args": [{"state": 0}]}, "names nothing"),
        ({"args": [{**MAP, "map": {"in": 2}}]}, "names nothing"),
        ({"args": [{**MAP, "map": {"size": "t"}}]}, "names nothing"),
        ({"args": [{**MAP, "map": MAP}]}, "names nothing"),
        ({"args": [{**MAP, "shape": ["u", 4]}]}, "not one of the token count"),
        ({"args": [{**MAP, "swizzle": 9}]}, "the swizzle 9"),
        ({"args": [{"size": "__import__('os')"}]}, "not a dimension expression"),
        ({"args": [{"size": "u * 2"}]}, "not one of the token count"),
        ({"args": None}, "launch without arguments"),
        ({"grid": ["t"]}, "not a pair of sizes"),
        ({"grid": ["t", [1]]}, "neither an integer nor an expression"),
    ],
)
def test_damaged_launches_are_refused(change: dict[str, Any], message: str) -> None:
    variants = [Variant(None, {**CONFIG, "launches": [{**LAUNCH, **change}]})]
    with pytest.raises(ArtifactError, match=message):
        launcher(kernel(variants=variants), CPU, Recorder().load)


def with_launch(config: dict[str, Any], **changes: Any) -> list[Variant]:
    return [Variant(None, {**CONFIG, **config, "launches": [{**LAUNCH, **changes}]})]


def test_maps_are_made_of_this_calls_tensors() -> None:
    weights = torch.zeros(8, 2)
    whole = {**MAP, "strides": [4, 1], "shape": ["t // 2", 4]}
    recorder, _ = run(8, [torch.zeros(16, 3), weights], variants=with_launch({}, args=[whole]))
    ((_, (map,)),) = recorder.launches
    assert map.tensor.data_ptr() == weights.data_ptr() and map.shape == (4, 4)
    with pytest.raises(ArtifactError, match=r"kernel 'k', in 1: a map of shape .* leads out of the tensor"):
        run(8, variants=with_launch({}, args=[MAP]))


def test_state_is_zero_at_first_and_outlives_a_call() -> None:
    recorder = Recorder()
    variants = with_launch({"state": [4, 8]}, args=[{"state": 0}, {"state": 1}])
    call = launcher(kernel(variants=variants), CPU, recorder.load)
    for _ in range(2):
        call([torch.zeros(4, 3), torch.zeros(2, 2)])
    (_, first), (_, second) = recorder.launches
    assert [tensor.tolist() for tensor in first] == [[0] * 4, [0] * 8]
    assert all(one is other for one, other in zip(first, second, strict=True))


def test_graphs_have_a_state_that_was_made_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros that are made while a graph is captured are zeros only once it was replayed."""
    recorder = Recorder()
    variants = with_launch({"state": [4]}, args=[{"state": 0}])
    call = launcher(kernel(variants=variants), CPU, recorder.load)
    ins = [torch.zeros(6, 3), torch.zeros(3, 2)]
    call(ins)
    monkeypatch.setattr(triton_kernels, "_capturing", lambda device: True)
    monkeypatch.setattr(torch, "zeros", None)  # nothing is made now
    call(ins)
    call(ins)
    plain, first, second = (args[0] for _, args in recorder.launches)
    assert first is second and first is not plain
    assert not first.any()


@pytest.mark.parametrize("state", [4, [0], [-1], ["t"], [1 << 40], [True]])
def test_damaged_state_is_refused(state: Any) -> None:
    with pytest.raises(ArtifactError, match="are not sizes of at most"):
        launcher(kernel(variants=with_launch({"state": state})), CPU, Recorder().load)


def test_sizes_know_the_multiprocessors() -> None:
    recorder = Recorder()
    variants = with_launch({}, grid=["min(sms, t)", "1"], args=[{"size": "sms"}])
    call = launcher(kernel(variants=variants), CPU, recorder.load, sms=132)
    call([torch.zeros(2000, 3), torch.zeros(1000, 2)])
    assert recorder.launches == [((132, 1), [132])]


@pytest.mark.parametrize("variants", [[], [Variant(4, CONFIG)]])
def test_some_variant_must_take_any_number(variants: list[Variant]) -> None:
    with pytest.raises(ArtifactError, match="no variant for every number of tokens"):
        launcher(kernel(variants=variants), CPU, Recorder().load)


def test_token_count_must_be_some_operands_size() -> None:
    with pytest.raises(ArtifactError, match="no operand's size"):
        launcher(kernel(tokens="u"), CPU, Recorder().load)


def test_more_tokens_than_32_bits_count() -> None:
    big = {**LAUNCH, "grid": ["1", "1"], "args": [{"size": "t * 1000000000"}]}
    with pytest.raises(InputError, match="more than kernels count"):
        run(3, variants=[Variant(None, {**CONFIG, "launches": [big]})])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ArtifactError, match="needs a GPU, and torch sees none"):
        bind(kernel(), [0, 1], Context(CPU, {}, lambda slot: None))
