"""`sparsec info`: banks, shares, cache and layers from operators alone, whatever way the experts are written."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import sparsec
from sparsec.diagnostics import SparsecError
from sparsec.dialects.moe import experts_hit
from sparsec.frontend.blocks import families, record
from sparsec.inspect.info import info, load_meta, render, to_json

E, K, H, I, T = 8, 2, 16, 12, 5  # noqa: E741
BANK = E * 3 * H * I


class Mlp(nn.Module):
    """One expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(H, 2 * I, bias=False), nn.Linear(I, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Moe(nn.Module):
    """Experts in two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(E, H, 2 * I)), nn.Parameter(torch.randn(E, I, H))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = self.gate(x).softmax(-1).topk(K)
        return weights, ids

    def expert(self, x: Tensor, e: Tensor | int) -> Tensor:
        gate, up = (x @ self.up[e]).chunk(2, -1)
        return (F.silu(gate) * up) @ self.down[e]


class DenseBmm(Moe):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        dense = torch.zeros(x.shape[0], E).scatter(1, ids, weights)
        gate, up = torch.bmm(x.expand(E, -1, -1), self.up).chunk(2, -1)
        return (torch.bmm(F.silu(gate) * up, self.down) * dense.T.unsqueeze(-1)).sum(0)


class Gathered(Moe):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        gate, up = torch.einsum("th,tkhi->tki", x, self.up[ids]).chunk(2, -1)
        return (torch.einsum("tki,tkih->tkh", F.silu(gate) * up, self.down[ids]) * weights.unsqueeze(-1)).sum(1)


class Unrolled(Moe):
    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out


class OnlyHit(Moe):
    """Loops over experts that were hit: `torch.export` cannot take it."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out = torch.zeros_like(x)
        for e in ids.unique():
            token, slot = torch.where(ids == e)
            out = out.index_add(0, token, self.expert(x[token], e) * weights[token, slot, None])
        return out


class Listed(nn.Module):
    """Experts in a list, all of them run."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(H, E, bias=False), nn.ModuleList(Mlp() for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K)
        shares = [(weights * (ids == e)).sum(-1, keepdim=True) for e in range(E)]
        return sum((expert(x) * w for expert, w in zip(self.experts, shares, strict=True)), torch.zeros_like(x))


class ListedIfAny(Listed):
    """The same, with the usual test that leaves out experts without tokens."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            hit = (ids == e).any(-1)
            if hit.any():
                out[hit] += expert(x[hit]) * (weights * (ids == e)).sum(-1, keepdim=True)[hit]
        return out


class Block(nn.Module):
    """A residual block around a part, with a shared expert where asked."""

    def __init__(self, index: int, part: nn.Module, shared: bool = False) -> None:
        super().__init__()
        self.index, self.part, self.shared = index, part, Mlp() if shared else None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.part(x) + (self.shared(x) if self.shared is not None else 0)


class Stack(nn.Module):
    """Ids through an embedding and blocks to logits."""

    def __init__(self, *blocks: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(40, H), nn.ModuleList(blocks)
        self.head = nn.Linear(H, 40, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("form", [DenseBmm, Gathered, Unrolled, OnlyHit, Listed, ListedIfAny])
def test_every_way_to_write_experts(form: type[nn.Module]) -> None:
    found = info(form(), (torch.randn(T, H),))
    assert [(r.experts, r.k, r.layers, r.parameters) for r in found.routed] == [(E, K, 1, BANK)]
    assert found.active == E * H + BANK * K // E
    assert found.routed[0].expert_parameters == 3 * H * I


def test_what_stopped_is_said() -> None:
    found = info(OnlyHit(), (torch.randn(T, H),))
    assert found.notes == ["the model traced in part: its Python depends on values of tensors"]


def test_dense_model() -> None:
    found = info(Stack(Block(0, Mlp()), Block(1, Mlp())))
    assert found.routed == [] and found.moe_layers == 0 and found.layers == 2
    assert found.active == found.total == 2 * 40 * H + 2 * 3 * H * I
    assert found.active_without_embedding == found.total - 40 * H


def test_render_says_what_was_looked_for() -> None:
    console = Console(width=300)
    with console.capture() as capture:
        console.print(render(info(Stack(Block(0, Mlp())))))
    assert "nothing sparse found; looked for a top-k" in capture.get()


def test_equal_numbers_of_layers_and_experts_are_told_apart() -> None:
    found = info(Stack(*(Block(i, Gathered()) for i in range(E))))
    assert [(r.experts, r.k, r.layers, r.parameters) for r in found.routed] == [(E, K, E, E * BANK)]
    assert found.total - found.active == E * (BANK - BANK * K // E)


def test_tied_embedding_is_at_work() -> None:
    untied, tied = info(Stack(Block(0, Mlp()))), info(Stack(Block(0, Mlp()), tied=True))
    assert untied.total - tied.total == 40 * H
    assert tied.active == tied.active_without_embedding == tied.total


def test_kinds_of_layers_in_one_list() -> None:
    found = info(Stack(Block(0, Mlp()), Block(1, Gathered()), Block(2, Mlp()), Block(3, Gathered())))
    assert (found.layers, found.moe_layers) == (4, 2)
    assert found.routed[0].place == "blocks.1.part"


def test_shared_expert() -> None:
    class WithShared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe, self.shared = Gathered(), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.moe(x) + self.shared(x)

    class Inlined(Gathered):
        def __init__(self) -> None:
            super().__init__()
            self.shared = Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.shared(x)

    beside = info(Stack(Block(0, WithShared()), Block(1, WithShared()))).routed[0]
    assert (beside.place, beside.shared_parameters) == ("blocks.0.part.moe", 0)
    within = info(Stack(Block(0, Inlined()), Block(1, Inlined()))).routed[0]
    assert (within.place, within.shared_parameters, within.shared_experts) == ("blocks.0.part", 3 * H * I, 1.0)


def test_traffic_counts_experts_once_per_step() -> None:
    found = info(Stack(Block(0, Gathered())), batches=(1, 3, 10_000))
    dense = 4 * (40 * H + E * H)
    one, three, many = found.traffic
    assert one.weight_bytes == pytest.approx(dense + 4 * H + 4 * BANK * K / E)
    assert three.experts_hit == [pytest.approx(E * (1 - (1 - K / E) ** 3))]
    assert three.weight_bytes == pytest.approx(dense + 3 * 4 * H + 4 * BANK * three.experts_hit[0] / E)
    assert many.experts_hit == [pytest.approx(E)]
    assert experts_hit(256, 8, 1) == pytest.approx(8)


def test_nothing_is_left_behind_in_the_model() -> None:
    model = Stack(Block(0, Gathered())).train()
    before = [dict(vars(module)) for module in model.modules()]
    info(model)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert model(torch.zeros(1, T, dtype=torch.long)).shape == (T, 40)


def test_repeated_blocks_run_once() -> None:
    seen = list[str]()
    few = record(Stack(*(Block(i, Gathered()) for i in range(2))), (torch.zeros(1, T, dtype=torch.long),))
    many = record(
        Stack(*(Block(i, Gathered()) for i in range(50))), (torch.zeros(1, T, dtype=torch.long),), progress=seen.append
    )
    assert seen == ["blocks.0"]
    operators = [[call.name for call in run.calls if call.name != "block"] for run in (few, many)]
    assert operators[0] == operators[1]


def test_families_tell_attributes_apart() -> None:
    class Scaled(Block):
        def __init__(self, index: int, scale: float) -> None:
            super().__init__(index, Mlp())
            self.scale = scale

    model = Stack(Scaled(0, 1.0), Scaled(1, 2.0), Scaled(2, 1.0), Block(3, Mlp()))
    members = {family.members for family in families(model) if family.container == "blocks"}
    assert members == {("blocks.0", "blocks.2"), ("blocks.1",), ("blocks.3",)}


def test_inputs_are_asked_for() -> None:
    with pytest.raises(SparsecError, match=r"Gathered.forward takes no input_ids.*\n  hint: give example inputs"):
        info(Gathered())


def test_wrong_inputs_are_no_partial_trace() -> None:
    with pytest.raises(SparsecError, match="Gathered cannot be run on shapes alone"):
        info(Gathered(), (torch.randn(T, H + 1),))


def test_json() -> None:
    found = info(Stack(Block(0, Gathered())))
    assert json.loads(to_json(found)) == asdict(found)


def tiny(config: Any, **options: Any) -> Any:
    """Three layers of four experts, one of which is used."""
    return config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts=4,
        num_experts_per_tok=1, shared_expert_intermediate_size=48, **options,
    )  # fmt: skip


def test_folder(tmp_path: Path) -> None:
    config = tiny(pytest.importorskip("transformers").MixtralConfig, architectures=["MixtralForCausalLM"])
    config.dtype = "bfloat16"
    config.save_pretrained(tmp_path)
    found = info(tmp_path)
    assert found.name == "MixtralForCausalLM"
    assert (found.layers, found.moe_layers, found.dtypes) == (3, 3, {"bfloat16": found.total})
    assert found.kv_bytes_per_token == 3 * 2 * 2 * 8 * 2
    assert [(r.experts, r.k, r.parameters) for r in found.routed] == [(4, 1, 3 * 4 * 3 * 32 * 48)]


def test_every_phase_and_the_artifact_tell_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(tiny(transformers.Qwen2MoeConfig)).eval()
    ids = torch.randint(0, 64, (2, 6))
    traced = info(model, (ids,))
    assert traced.routed[0].shared_experts == pytest.approx(1 + 32 / (3 * 32 * 48), abs=1e-3)

    compiled = sparsec.compile(model, (ids,), target="cpu")
    artifact = compiled.save(tmp_path / "qwen")
    for told in (info(compiled.captured), info(compiled.result.module), info(artifact)):
        assert replace(told, name=traced.name, notes=[], traffic=traced.traffic) == traced
        for a, b in zip(told.traffic, traced.traffic, strict=True):
            assert a.weight_bytes == pytest.approx(b.weight_bytes)


def test_quantised_folder_is_noted(tmp_path: Path) -> None:
    config = tiny(pytest.importorskip("transformers").GptOssConfig, architectures=["GptOssForCausalLM"])
    config.quantization_config = {"quant_method": "mxfp4"}
    config.save_pretrained(tmp_path)
    found = info(tmp_path)
    assert [(r.experts, r.k, r.layers) for r in found.routed] == [(4, 1, 3)]
    assert any("quantisation" in note for note in found.notes)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(SparsecError, match=r"holds no config\.json"):
        load_meta(tmp_path)
