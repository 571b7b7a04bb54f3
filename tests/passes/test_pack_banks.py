"""Packed banks of modules: stacks of experts, quantised values, and what the pass refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsec import pipeline
from sparsec.diagnostics import CompileError
from sparsec.ir.core import Module
from sparsec.ir.interp import DerivedWeights, evaluate_module
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module
from sparsec.ir.verify import verify_module

TEXT = """
module {phase = "raise"}

func @main(%x: tensor<s0x64xf32> {kind = "input"}, %ids: tensor<s0x1xi64> {kind = "input"},
  %w: tensor<s0x1xf32> {kind = "input"},
  %u0: tensor<96x64xf32> {kind = "param", source = "e.0.up"},
  %u1: tensor<96x64xf32> {kind = "param", source = "e.1.up"},
  %d0: tensor<64x48xf32> {kind = "param", source = "e.0.down"},
  %d1: tensor<64x48xf32> {kind = "param", source = "e.1.down"}
) -> (tensor<s0x64xf32> {kind = "output"}) {
  %up = aten.stack([%u0, %u1]) : tensor<2x96x64xf32>
  %down = aten.stack([%d0, %d1]) : tensor<2x64x48xf32>
  %y = moe.experts(%x, %ids, %w, %up, %down) : tensor<s0x64xf32> {
    activation(%a: tensor<rx48xf32>, %b: tensor<rx48xf32>):
      %g = aten.silu(%a) : tensor<rx48xf32>
      %h = aten.mul.Tensor(%g, %b) : tensor<rx48xf32>
      yield %h
  }
  return %y
}
"""


def weights() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    shapes = {"up": (96, 64), "down": (64, 48)}
    return {f"e.{e}.{name}": torch.randn(shape, generator=gen) for e in range(2) for name, shape in shapes.items()}


def packed(kind: str) -> Module:
    module = parse_module(TEXT)
    pipeline.run_passes(module, f"derive-weights,pack-banks{{weights={kind}}}")
    return module


def run(module: Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1)
    inputs = [torch.randn(40, 64, generator=gen), torch.arange(40).reshape(40, 1) % 2, torch.ones(40, 1)]
    result: torch.Tensor = evaluate_module(module, inputs, given)[0]
    return result


@pytest.mark.parametrize(("kind", "most"), [("model", 1e-6), ("int8", 0.015), ("int4", 0.2)])
def test_stacking_and_packing_are_one_step(kind: str, most: float) -> None:
    module = packed(kind)
    verify_module(module)
    sources = {attrs["source"]: attrs["of"] for attrs in module.main.arg_attrs.values() if attrs["kind"] == "derived"}
    if kind == "model":
        assert sources == {
            "derived/e.*.up.tiles": ("e.0.up", "e.1.up"),
            "derived/e.*.down.tiles": ("e.0.down", "e.1.down"),
        }
    else:
        assert sources[f"derived/e.*.up.{kind}"] == ("e.0.up", "e.1.up", "derived/e.*.up.scales")
    assert {op.name for name in module.funcs if name != "main" for op in module.funcs[name].body.ops} <= {
        "aten.stack", "moe.pack", "moe.scales", "func.return",
    }  # fmt: skip
    assert len(module.main.body.args) == 3 + len(sources)
    wanted, found = run(parse_module(TEXT), weights()), run(module, weights())
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert error < most
    assert kind == "model" or error > 0.001


def test_scales_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.runtime import tiles

    calls, find = list[Any](), tiles.find_scales

    def counted(*args: Any) -> Any:
        calls.append(args)
        return find(*args)

    monkeypatch.setattr(tiles, "find_scales", counted)
    held = DerivedWeights(packed("int4"), weights())
    assert held["derived/e.*.up.int4"].dtype == torch.uint8
    assert held["derived/e.*.up.scales"] is held["derived/e.*.up.scales"]
    assert len(calls) == 1


def test_a_second_run_changes_nothing() -> None:
    module = packed("model")
    again = pipeline.run_passes(module, "derive-weights,pack-banks")
    assert not any(record.changed for record in again.records)


def test_the_modules_own_attribute_comes_first() -> None:
    module = parse_module(TEXT.replace('"raise"', '"raise", weights = "int8"'))
    pipeline.run_passes(module, "derive-weights,pack-banks")
    assert any(op.attrs.get("packing") == "int8" for op in module.main.body.ops)


@pytest.mark.parametrize(
    ("kind", "target", "said"),
    [
        ("int3", "cpu", "model, int8, int4, fp8, mxfp4, not as 'int3'"),
        ("int4", "cuda:sm_90", "int4 weights are for target cpu"),
        ("fp8", "cpu", "fp8 weights are for GPUs, not for cpu, which has int8 and int4"),
        ("int8,activations=fp8", "cpu", r"fp8 activations go with fp8 weights on a GPU: .* \(--weights fp8\)"),
        ("mxfp4,activations=fp8", "cuda:sm_90", "fp8 activations go with fp8 weights on a GPU"),
        ("fp8,activations=int8", "cuda:sm_90", "int8 activations go with int8 or int4 weights on a CPU"),
    ],
)
def test_what_is_refused(kind: str, target: str, said: str) -> None:
    with pytest.raises(CompileError, match=said):
        pipeline.run_passes(parse_module(TEXT), f"pack-banks{{weights={kind}}}", target=target)


def on_gpu(text: str, kind: str) -> pipeline.Result:
    module = parse_module(text)
    return pipeline.run_passes(module, f"derive-weights,fuse-experts,pack-banks{{weights={kind}}}", target="cuda:sm_90")


@pytest.mark.parametrize(("kind", "most"), [("fp8", 0.06), ("mxfp4", 0.25)])
def test_banks_of_a_gpu_lie_in_blocks(kind: str, most: float) -> None:
    module = on_gpu(TEXT, kind).module
    verify_module(module)
    assert print_module(parse_module(print_module(module))) == print_module(module)
    gemms = [op for op in module.main.body.ops if op.name in ("moe.gather_gemm", "moe.gemm_combine")]
    assert [op.attrs["packing"] for op in gemms] == [kind, kind]
    sources = {attrs["source"]: attrs["of"] for attrs in module.main.arg_attrs.values() if attrs["kind"] == "derived"}
    assert sources[f"derived/e.*.up.{kind}"] == ("e.0.up", "e.1.up", "derived/e.*.up.scales")
    wanted, found = run(parse_module(TEXT), weights()), run(module, weights())
    assert 0.01 < ((found - wanted).norm() / wanted.norm()).item() < most


def test_transposed_interleaved_banks_keep_the_order_of_their_columns() -> None:
    text = TEXT.replace("96x64", "64x96").replace("64x48xf32> {kind", "48x64xf32> {kind").replace("2x96x64", "2x64x96")
    text = text.replace("tensor<2x64x48xf32>", "tensor<2x48x64xf32>")
    attrs = '{layout = "interleaved", up_transposed = true, down_transposed = true}'
    text = text.replace("%up, %down) :", f"%up, %down) {attrs} :")
    given = {name: weight.t().contiguous() for name, weight in weights().items()}
    module = on_gpu(text, "fp8").module
    wanted, found = run(parse_module(text), given), run(module, given)
    assert 0.01 < ((found - wanted).norm() / wanted.norm()).item() < 0.06


def test_banks_that_others_read_stay_and_a_remark_says_so() -> None:
    text = TEXT.replace('-> (tensor<s0x64xf32> {kind = "output"})', "-> (tensor<s0x64xf32>, tensor<2x96x64xf32>)")
    result = on_gpu(text.replace("return %y", "%z = aten.neg(%up) : tensor<2x96x64xf32>\n  return %y, %z"), "fp8")
    packings = [op.attrs.get("packing") for op in result.module.main.body.ops if op.name.startswith("moe.g")]
    assert packings == [None, None, "fp8"]
    (remark,) = [remark for remark in result.remarks if remark.kind == "missed"]
    assert "not fp8" in remark.message and "reads up" in remark.message


def test_other_targets_keep_their_banks() -> None:
    module = parse_module(TEXT)
    assert not pipeline.run_passes(module, "pack-banks", target="cuda:sm_90").records[0].changed


def test_a_weight_is_derived_after_those_it_is_computed_of() -> None:
    module = packed("int8")
    module.main.body.args.reverse()
    with pytest.raises(CompileError, match=r"computed of 'derived/e.\*.\w+.scales', which is not derived before it"):
        verify_module(module)
