"""Every way to write a router becomes one `moe.route`, which computes what was written, for any number of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsec import pipeline
from sparsec.frontend.importer import import_program
from sparsec.ir.core import Module, Op
from tests.codegen.triton.handwritten_routers import HANDWRITTEN
from tests.codegen.triton.routers import ROUTERS, Router
from tests.passes.route_layers import HIDDEN, Layer, captured, check, left

RAISE = "canonicalize,cse,dce,canonicalize-routers,dce,raise-route,canonicalize-routers,canonicalize,cse,dce"
ALL = {**ROUTERS, **HANDWRITTEN}


@pytest.mark.parametrize("name", sorted(ALL))
def test_one_route(name: str) -> None:
    router: Router = ALL[name]
    layer = Layer(router, router.experts, router.params)
    module, held = captured(layer, torch.randn(5, HIDDEN), bank=router.experts)
    result = pipeline.run_passes(module, RAISE)
    assert [remark.message for remark in result.remarks if remark.kind == "missed"] == []
    assert left(module) == ["aten.linear", "moe.route", "moe.experts"]
    for tokens in (1, 37, 300):
        check(layer, module, held, torch.randn(tokens, HIDDEN))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "phimoe", "sort_slice"])
def test_bf16(name: str) -> None:
    router: Router = ALL[name]
    layer = Layer(router, router.experts, router.params).bfloat16()
    module, held = captured(layer, torch.randn(5, HIDDEN).bfloat16(), bank=router.experts)
    pipeline.run_passes(module, RAISE.replace("canonicalize-routers,canonicalize", "canonicalize"))
    assert left(module) == ["aten.linear", "moe.route", "moe.experts"]
    check(layer, module, held, torch.randn(37, HIDDEN).bfloat16())


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3", "groups_by_one_hot"])
def test_groups_that_are_all_kept_fold_away(name: str, dtype: torch.dtype, decomposed: bool, groups: int) -> None:
    if decomposed and name == "groups_by_one_hot":
        pytest.skip("one_hot is taken apart into a comparison")
    options = {"k": 2, "groups": groups, "kept": groups}
    router = Router(ALL[name].fn, 8, ((8,),) if ALL[name].params else (), options)
    layer = Layer(router, 8, router.params).to(dtype).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(5, HIDDEN, dtype=dtype),), dynamic_shapes=shapes)
        module, _ = import_program(program.run_decompositions(None if decomposed else {}))
    pipeline.run_passes(module, f"recompose,{RAISE}")
    names = [op.name for op in module.main.body.ops]
    assert names.count("aten.topk") == 1
    assert not [name for name in names if "scatter" in name or "where" in name or "fill" in name or "expand" in name]


def raised(layer: nn.Module, *args: Tensor, experts: int = 8) -> tuple[Module, dict[str, Tensor], Op]:
    module, held = captured(layer, *args, bank=experts)
    result = pipeline.run_passes(module, RAISE)
    assert not [remark for remark in result.remarks if remark.kind == "missed"]
    (route,) = [op for op in module.main.body.ops if op.name == "moe.route"]
    return module, held, route


class CosineLogits(Layer):
    def logits(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x, dim=-1), F.normalize(self.gate, dim=-1)) / 0.07


class TimesMatrix(Layer):
    def logits(self, x: Tensor) -> Tensor:
        return x @ self.gate.T


class Einsum(Layer):
    def logits(self, x: Tensor) -> Tensor:
        return torch.einsum("...h,eh->...e", x, self.gate)


class TwoLayers(Layer):
    def logits(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.gate)), torch.eye(self.gate.shape[0]) * 2)


class Distances(Layer):
    def logits(self, x: Tensor) -> Tensor:
        return -(x.unsqueeze(-2) - self.gate).pow(2).sum(-1)


class Cdist(Layer):
    def logits(self, x: Tensor) -> Tensor:
        return -torch.cdist(x, self.gate)


@pytest.mark.parametrize("cls", [CosineLogits, TimesMatrix, Einsum, TwoLayers, Distances, Cdist])
def test_logits_of_any_kind(cls: type[Layer]) -> None:
    layer = cls(ROUTERS["mixtral"], 8)
    module, held, route = raised(layer, torch.randn(5, HIDDEN))
    assert route.operands[0].tensor.shape[-1] == 8
    assert {op.name for op in module.main.body.ops}.isdisjoint({"aten.topk", "aten.softmax.int", "aten.gather"})
    check(layer, module, held, torch.randn(37, HIDDEN))


@pytest.mark.parametrize("name", ["mixtral", "two_argmaxes", "group_winners", "logit_bias"])
def test_batches_stay_until_the_bank(name: str) -> None:
    """Routers that work on [batch, length, experts]."""

    def batched(z: Tensor, *params: Tensor) -> Any:
        if name == "two_argmaxes":
            first = z.argmax(-1)
            rest = z.masked_fill(F.one_hot(first, z.shape[-1]).bool(), float("-inf"))
            ids = torch.stack([first, rest.argmax(-1)], dim=-1)
            return ids, z.softmax(-1).gather(-1, ids)
        if name == "group_winners":
            best, at = z.unflatten(-1, (3, -1)).max(-1)
            return at + torch.arange(3) * (z.shape[-1] // 3), best.sigmoid()
        return ALL[name](z, *params)

    router = ALL[name]
    layer = Layer(batched, router.experts, router.params, flat=False)
    module, held, _ = raised(layer, torch.randn(2, 5, HIDDEN), experts=router.experts)
    assert left(module) == ["aten.linear", "moe.route", "moe.experts"]
    for batch, length in ((1, 1), (1, 37), (3, 100)):
        check(layer, module, held, torch.randn(batch, length, HIDDEN))


class Hash(Layer):
    """deepseek_v4: the number of the token says which experts."""

    def __init__(self) -> None:
        super().__init__(None, 8)
        self.table: Tensor
        self.register_buffer("table", torch.randint(0, 8, (50, 2)))

    def forward(self, x: Tensor, *rows: Tensor) -> Any:
        scores = F.softplus(self.logits(x)).sqrt()
        ids = self.table[rows[0]].long()
        weights = scores.gather(1, ids)
        return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 1.5


def test_ids_of_a_table() -> None:
    layer = Hash()
    module, held, route = raised(layer, torch.randn(5, HIDDEN), torch.randint(0, 50, (5,)))
    assert left(module) == ["aten.linear", "aten.index.Tensor", "moe.route", "moe.experts"]
    assert [str(value.type) for value in route.operands] == ["tensor<s0x8xf32>", "tensor<s0x2xi64>"]
    for tokens in (1, 37, 300):
        check(layer, module, held, torch.randn(tokens, HIDDEN), torch.randint(0, 50, (tokens,)))


def joint(z: Tensor, bias: Tensor) -> Any:
    """inkling: the shared experts take part in the normalisation of the chosen ones."""
    routed, shared = z[:, :8], z[:, 8:]
    ids = (routed.sigmoid() + bias).topk(2, dim=-1).indices
    every = F.logsigmoid(torch.cat([routed.gather(1, ids), shared], dim=-1))
    gamma = torch.exp(every - every.logsumexp(-1, keepdim=True)) * 2.5
    return ids, gamma[:, :2], gamma[:, 2:]


def test_shared_experts_in_the_same_normalisation() -> None:
    layer = Layer(joint, 10, ((8,),))
    module, held, route = raised(layer, torch.randn(5, HIDDEN))
    assert left(module) == ["aten.linear", "moe.route", "moe.experts"]
    assert [str(result.type) for result in route.results[2:]] == ["tensor<s0x2xf32>"]
    for tokens in (1, 37, 300):
        check(layer, module, held, torch.randn(tokens, HIDDEN))


def padded(z: Tensor, real: Tensor) -> Any:
    """Tokens of padding go nowhere."""
    weights, ids = z.softmax(-1).topk(2)
    return ids.masked_fill(~real[:, None], z.shape[-1]), weights * real.to(z.dtype)[:, None]


def test_a_mask_of_tokens() -> None:
    layer = Layer(padded, 8)
    module, held, _ = raised(layer, torch.randn(5, HIDDEN), torch.rand(5) > 0.5)
    assert left(module) == ["aten.linear", "moe.route", "moe.experts"]
    for tokens in (1, 37):
        check(layer, module, held, torch.randn(tokens, HIDDEN), torch.rand(tokens) > 0.5)


def read_elsewhere(z: Tensor) -> Any:
    p = z.softmax(-1)
    weights, ids = p.topk(2)
    return ids, weights / weights.sum(-1, keepdim=True), p, p.mean(0), p.amax(-1), z


def test_what_the_model_reads_of_its_router_is_computed_once() -> None:
    layer = Layer(read_elsewhere, 8)
    module, held, route = raised(layer, torch.randn(5, HIDDEN))
    assert left(module) == ["aten.linear", "moe.route", "aten.mean.dim", "moe.experts"]
    assert [str(result.type) for result in route.results[2:]] == ["tensor<s0x8xf32>", "tensor<s0x1xf32>"]
    check(layer, module, held, torch.randn(37, HIDDEN))


def test_what_mixes_tokens_stays_outside_with_a_remark() -> None:
    def sinkhorn(z: Tensor) -> Any:
        p = z.exp()
        for _ in range(2):
            p = p / p.sum(0, keepdim=True)
            p = p / p.sum(1, keepdim=True)
        ids = p.topk(2).indices
        return ids, z.sigmoid().gather(1, ids)

    layer = Layer(sinkhorn, 8)
    module, held = captured(layer, torch.randn(5, HIDDEN), bank=8)
    result = pipeline.run_passes(module, RAISE)
    missed = [remark for remark in result.remarks if remark.kind == "missed"]
    assert missed and all("works across tokens" in remark.message for remark in missed)
    assert left(module).count("moe.route") == 1
    check(layer, module, held, torch.randn(37, HIDDEN))


class Unbanked(nn.Module):
    """A choice of 8 with nothing behind it that is a bank."""

    def __init__(self, experts: bool, classes: int = 8) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, classes)
        self.experts = nn.Parameter(torch.randn(8 if experts else 5, HIDDEN, 3))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(2)
        dense = torch.zeros(x.shape[0], self.gate.out_features).scatter(1, ids, weights)
        return dense.sum(0) + self.experts.sum()


@pytest.mark.parametrize(("experts", "classes", "said"), [(True, 8, True), (False, 8, False), (True, 30, False)])
def test_a_router_without_a_bank_is_named_and_sampling_is_not(experts: bool, classes: int, said: bool) -> None:
    layer = Unbanked(experts, classes)
    with torch.no_grad():
        program = torch.export.export(layer, (torch.randn(5, HIDDEN),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        module, _ = import_program(program.run_decompositions({}))
    result = pipeline.run_passes(module, RAISE)
    missed = [remark for remark in result.remarks if remark.kind == "missed"]
    assert len(missed) == said
    assert all("chooses among 8 experts feeds no bank" in remark.message and remark.loc.line for remark in missed)
