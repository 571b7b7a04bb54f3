"""Models to modules: what stays open, what is restored, what is said when it does not work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsec.diagnostics import CompileError
from sparsec.frontend.capture import capture
from sparsec.ir.verify import verify_module
from tests.frontend.helpers import logits, mixtral, outputs, relative_error, token_ids, zoo_model

FAMILIES = [
    "mixtral", "olmoe", "qwen3_moe", "qwen2_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "glm4_moe",
    pytest.param("qwen3_5_moe", marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families_compute_the_same_at_every_shape(family: str) -> None:
    model, inputs = zoo_model(family)
    captured = capture(model, (), inputs)
    verify_module(captured.module)
    assert sum(op.name == "moe.experts" for op in captured.module.main.body.ops) == 2
    assert not captured.warnings
    for batch, sequence in ((2, 12), (3, 7), (1, 1), (1, 20)):
        ids = token_ids(batch, sequence)
        assert relative_error(outputs(captured, ids)[0], logits(model, ids)) <= 1e-5


def test_a_model_of_transformers() -> None:
    model = mixtral()
    model.set_experts_implementation("grouped_mm")
    captured = capture(model, (), {"input_ids": token_ids(1, 5)})
    assert model.config._experts_implementation == "grouped_mm"
    assert model.config.use_cache is True
    verify_module(captured.module)
    (taken,) = [arg for arg in captured.module.main.body.args if captured.module.main.arg_attrs[arg]["kind"] == "input"]
    assert str(taken.type) == "tensor<s0xs1xi64>"
    assert captured.structure_json["name"] == "MoeCausalLMOutputWithPast"
    assert captured.structure_json["keys"] == ["logits"]
    for batch, sequence in ((2, 12), (1, 1)):
        ids = token_ids(batch, sequence)
        assert relative_error(outputs(captured, ids)[0], logits(model, ids)) <= 1e-5


def test_experts_are_located_in_the_models_own_code() -> None:
    captured = capture(mixtral(), (), {"input_ids": token_ids(2, 5)})
    banks = [op for op in captured.module.main.body.ops if op.name == "moe.experts"]
    assert [op.loc.scope for op in banks] == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert {op.loc.file for op in banks} == {"transformers/models/mixtral/modeling_mixtral.py"}


def test_parameters_may_have_no_memory() -> None:
    captured = capture(mixtral().to("meta"), (), {"input_ids": token_ids(2, 5)})
    verify_module(captured.module)
    assert {tensor.device.type for tensor in captured.weights.values()} == {"meta"}
    assert sum(op.name == "moe.experts" for op in captured.module.main.body.ops) == 2


class Dense(nn.Module):
    """A row-wise layer; `scale` is there to have a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(x) * scale


def test_dynamic_says_which_dimensions_stay_open() -> None:
    x = torch.randn(5, 4)
    shapes = {"x": {0: torch.export.Dim("rows", min=2, max=64)}}
    for dynamic, expected in ((True, "tensor<s0x4xf32>"), (False, "tensor<5x4xf32>"), (shapes, "tensor<s0x4xf32>")):
        captured = capture(Dense().eval(), (x,), dynamic=dynamic)
        assert str(captured.module.main.body.args[0].type) == expected


def test_a_constant_argument_is_part_of_the_structure() -> None:
    captured = capture(Dense().eval(), (torch.randn(5, 4),), {"scale": 3.0})
    assert captured.inputs_json["kwargs"]["items"] == [{"kind": "const", "value": 3.0}]


def test_a_captured_program_is_taken_too() -> None:
    model, x = Dense().eval(), torch.randn(5, 4)
    captured = capture(torch.export.export(model, (x,), strict=False))
    assert torch.equal(outputs(captured, x)[0], model(x))


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([row.sum(0, keepdim=True) for row in x])


def test_a_dimension_that_the_code_fixes_is_reported() -> None:
    (warning,) = capture(Fixed().eval(), (torch.randn(5, 4),)).warnings
    assert "dimension 0 of 'x' is fixed to 5" in warning.message


class Blocks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = x
        for _ in range((x.shape[0] + 7) // 8):
            out = out + x
        return out


@pytest.mark.skipif(torch.__version__ < "2.13", reason="this torch keeps no guards")
def test_sizes_that_the_code_ties_are_reported() -> None:
    (warning,) = capture(Blocks().eval(), (torch.randn(12, 4),)).warnings
    assert "x.shape[0]) // 8) == 2" in warning.message


def test_training_mode_is_reported() -> None:
    (warning,) = capture(Dense(), (torch.randn(5, 4),)).warnings
    assert "training mode" in warning.message


class Router(nn.Module):
    experts = 4

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, self.experts)
        self.up = nn.Parameter(torch.randn(self.experts, 8, 8))

    def chosen(self, x: Tensor) -> Tensor:
        return self.gate(x).topk(2, dim=-1).indices


class LoopOverHit(Router):
    def forward(self, x: Tensor) -> Tensor:
        ids, out = self.chosen(x), torch.zeros_like(x)
        for e in torch.unique(ids):
            out = out + F.linear(x, self.up[e])
        return out


class SkipEmpty(Router):
    def forward(self, x: Tensor) -> Tensor:
        ids, out = self.chosen(x), torch.zeros_like(x)
        for e in range(self.experts):
            rows, _ = torch.where(ids == e)
            if rows.numel() == 0:
                continue
            out = out.index_add(0, rows, F.linear(x[rows], self.up[e]))
        return out


class Bincount(Router):
    def forward(self, x: Tensor) -> Tensor:
        sizes = torch.bincount(self.chosen(x).flatten(), minlength=self.experts).tolist()
        return torch.cat([part.sum(0, keepdim=True) for part in x.repeat(2, 1).split(sizes)])


@pytest.mark.parametrize(
    ("model", "line", "advice"),
    [
        (LoopOverHit, "for e in torch.unique(ids):", "range(num_experts)"),
        (SkipEmpty, "if rows.numel() == 0:", "leave the test out"),
        (Bincount, "sizes = torch.bincount(", "F.one_hot"),
    ],
)
def test_what_torch_cannot_export_is_explained(
    model: type[Router], line: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CompileError) as caught:
        capture(model().eval(), (torch.randn(6, 8),))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.loc.file.endswith("test_capture.py")
    assert diagnostic.loc.source.startswith(line)
    assert advice in diagnostic.hint or advice in diagnostic.excerpt
    assert caught.value.__cause__ is not None
    assert len(str(caught.value).splitlines()) <= 5
    assert capsys.readouterr().err == ""


def test_an_argument_without_its_tuple() -> None:
    with pytest.raises(CompileError, match="are a Tensor, not a tuple") as caught:
        capture(nn.Linear(3, 4), torch.randn(2, 3))  # type: ignore[arg-type]
    assert "(x,)" in str(caught.value)
