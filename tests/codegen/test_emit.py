"""Plans out of lowered modules."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from sparsec.codegen.emit import emit
from sparsec.codegen.plan import attribute
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Block, Func, Module
from sparsec.ir.types import DType, Sym
from sparsec.runtime.check import check_plan
from sparsec.runtime.executor import Program
from sparsec.runtime.plan import Call, Free, Launch
from tests.runtime.models import S0, Layer, add, arange_module, cache_module, layer_module, tensor_type


def test_values_are_freed_after_their_last_use_and_weights_never() -> None:
    plan = emit(layer_module(Layer()), "cpu").plan
    weights = {arg.slot for arg in plan.args if arg.kind != "input"}
    outputs = {output.slot for output in plan.outputs}
    freed = [slot for step in plan.steps if isinstance(step, Free) for slot in step.slots]
    assert len(freed) == len(set(freed))
    assert not set(freed) & (weights | outputs)
    defined = {slot for step in plan.steps if not isinstance(step, Free) for slot in step.outs}
    inputs = {arg.slot for arg in plan.args if arg.kind == "input"}
    assert set(freed) == (defined | inputs) - outputs


def test_kernels_hold_attributes_region_and_types() -> None:
    plan = emit(layer_module(Layer(layout="single", bias=True)), "cpu").plan
    assert [step.kernel for step in plan.steps if isinstance(step, Launch)] == [
        "route_group_0",
        "gather_gemm_0",
        "gemm_combine_0",
    ]
    gather = plan.kernels["gather_gemm_0"]
    assert (gather.op, gather.backend, gather.tokens) == ("moe.gather_gemm", "onednn", "t")
    assert gather.attrs["layout"] == "single"
    assert gather.attrs["k"] == 2
    assert [param.shape for param in gather.regions["activation"].params] == [("r", 48)]
    assert [variant.up_to for variant in gather.variants] == [None]
    assert "variants" not in gather.attrs


def test_variants_end_with_one_for_any_number_of_tokens() -> None:
    plan = emit(layer_module(Layer(variants=({"up_to": 8, "path": "batched"},))), "cpu").plan
    variants = plan.kernels["gather_gemm_0"].variants
    assert [(variant.up_to, variant.config) for variant in variants] == [
        (8, {"path": "batched"}),
        (None, {"path": "batched"}),
    ]


def test_factories_create_on_the_programs_device_and_others_follow_their_operands() -> None:
    plan = emit(arange_module(), "cpu").plan
    calls = {step.op: step for step in plan.steps if isinstance(step, Call)}
    assert calls["aten.arange.default"].kwargs == {"dtype": {"dtype": "f32"}, "device": {"device": True}}
    assert all("device" not in step.kwargs for op, step in calls.items() if op != "aten.arange.default")
    assert calls["aten.nonzero.default"].binds == [(calls["aten.nonzero.default"].outs[0], 0, "u0")]


def test_arguments_after_a_gap_go_by_name() -> None:
    block = Block([tensor_type(S0, 4)], ["x"])
    out = add(block, "aten.sum.dim_IntList", [block.args[0]], [tensor_type(S0)], dim=(-1,), dtype=DType.f32).result
    best = add(block, "aten.topk", [out], [tensor_type(1), tensor_type(1, dtype=torch.int64)], k=1, largest=False)
    add(block, "func.return", [best.results[0]], ())
    plan = emit(Module([Func("main", block)]), "cpu").plan
    total, least = [step for step in plan.steps if isinstance(step, Call)]
    assert (total.args, total.kwargs) == ([{"slot": 0}, [-1]], {"dtype": {"dtype": "f32"}})
    assert (least.args, least.kwargs) == ([{"slot": total.outs[0]}, 1], {"largest": False})
    assert Program(plan, {})(torch.tensor([[1.0] * 4, [0.5] * 4]))[0].tolist() == [2.0]


def cache_with_late_reader(view: bool) -> Module:
    """Reads the old contents of the cache, or a view made before, after the update."""
    module = cache_module()
    block = module.main.body
    cache_type = tensor_type(4, 3)
    cache, returned = block.args[2], block.terminator
    old = cache
    if view:
        select = add(block, "aten.reshape", [cache], [cache_type], shape=(4, 3))
        block.ops.remove(select)
        block.ops.insert(0, select)
        old = select.result
    late = add(block, "aten.neg", [old], [cache_type])
    block.ops.remove(returned)
    block.append(returned)
    returned.operands = (late.result, returned.operands[1])
    return module


@pytest.mark.parametrize("view", [False, True])
def test_a_buffer_that_is_still_read_is_not_updated_in_place(view: bool) -> None:
    plan = emit(cache_with_late_reader(view), "cpu").plan
    assert "aten.index_copy.default" in [step.op for step in plan.steps if isinstance(step, Call)]
    run = Program(plan, {"cache": torch.zeros(4, 3)})
    assert not run(torch.ones(1, 3), torch.tensor([0]))[0].any()
    assert run(torch.ones(1, 3), torch.tensor([1]))[0].tolist()[0] == [-1, -1, -1]


def test_what_triton_cannot_express_is_run_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.codegen.triton import emit as triton_emit

    def decline(func: Func) -> None:
        raise CompileError("there is no rule for 'aten.erfinv'")

    monkeypatch.setattr(triton_emit, "sketch_kernel", decline)
    layer = Layer(backend="triton", variants=({"block_m": 16},))
    emitted = emit(layer_module(layer), "cuda:sm_90")
    assert {kernel.backend for kernel in emitted.plan.kernels.values()} == {"torch"}
    assert [remark.kind for remark in emitted.remarks] == ["missed"] * 3
    assert "is run by PyTorch operators: there is no rule for 'aten.erfinv'" in emitted.remarks[0].message
    x = torch.randn(5, layer.hidden)
    y = Program(emitted.plan, layer.weights)(x)[0]
    torch.testing.assert_close(y, Program(emit(layer_module(Layer()), "cpu").plan, layer.weights)(x)[0])


def test_nothing_is_made_for_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an artifact whose experts all run by PyTorch."""
    module = layer_module(Layer(backend="triton", variants=({"block_m": 16},)))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(CompileError, match="compiling for a GPU needs Triton"):
        emit(module, "cuda:sm_90")


def test_only_lowered_modules_are_emitted() -> None:
    block = Block([tensor_type(S0, 2, dtype=torch.int64)], ["ids"])
    order, offsets = tensor_type(Sym("2*s0"), dtype=torch.int32), tensor_type(5, dtype=torch.int32)
    results = add(block, "moe.group", [block.args[0]], [order, offsets], num_experts=4).results
    add(block, "func.return", results, ())
    with pytest.raises(CompileError, match=r"'moe\.group' is still in @main"):
        emit(Module([Func("main", block)]), "cpu")


@pytest.mark.parametrize(
    ("attr", "tree"),
    [
        (Sym("s0*2"), {"dim": "s0*2"}),
        (DType.bf16, {"dtype": "bf16"}),
        (float("-inf"), {"float": "-inf"}),
        (float("nan"), {"float": "nan"}),
        ((1, Sym("s0")), [1, {"dim": "s0"}]),
        ("tanh", "tanh"),
        (None, None),
        (True, True),
    ],
)
def test_attributes_as_json(attr: Any, tree: Any) -> None:
    assert attribute(attr) == tree


def test_what_is_emitted_passes_the_runtimes_checks() -> None:
    for module in (layer_module(Layer(bias=True)), cache_module(), arange_module()):
        check_plan(emit(module, "cpu").plan)
