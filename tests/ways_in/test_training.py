"""Training: `torch.compile(model, backend="sparsec")` against eager autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
import sparsec.hf
from sparsec import backend
from sparsec.differentiable import TARGET
from sparsec.training import with_banks
from tests.ways_in import tiny
from tests.ways_in.test_torch_compile import hand_written, rows_of

assert sparsec.hf.NAME == "sparsec"


@pytest.fixture
def banks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many banks each differentiated graph has."""
    torch._dynamo.reset()
    seen: list[int] = []

    def counted(*args: Any) -> Any:
        made = with_banks(*args)
        seen.append(0 if made is None else sum(node.target is TARGET for node in made.graph.nodes))
        return made

    monkeypatch.setattr(backend, "with_banks", counted)
    return seen


def gpt_oss() -> Any:
    import transformers as t

    torch.manual_seed(0)
    config = t.GptOssConfig(**tiny.SIZES, intermediate_size=24, num_local_experts=4, head_dim=16)
    config._attn_implementation = "eager"
    model = t.GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def gradients(model: Any, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (got[name] - grad).norm() <= tolerance * grad.norm().clamp_min(1e-6), name


@pytest.mark.parametrize(
    "family", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "qwen3_moe"))]
)
def test_gradients_of_a_model(family: str, banks: list[int]) -> None:
    model = (gpt_oss() if family == "gpt_oss" else tiny.model(family)).train()
    compiled = torch.compile(model, backend="sparsec", fullgraph=True, dynamic=True, options={"dense": "aten"})
    for shape in ((2, 12), (3, 7)):
        ids = tiny.ids(*shape)
        wanted = gradients(model, lambda: model(ids, labels=ids, use_cache=False).loss)  # noqa: B023 (called at once)
        with sparsec.use_experts(model) if family == "gpt_oss" else nullcontext():
            got = gradients(model, lambda: compiled(ids, labels=ids, use_cache=False).loss)  # noqa: B023
        assert_close(got, wanted)
    assert set(banks) == {2}


@pytest.mark.parametrize("form", ["MaskedSum", "StackThenGather", "WeightsOfEachToken"])
def test_a_layer_written_by_hand(form: str, banks: list[int]) -> None:
    layer = hand_written(form)
    compiled = torch.compile(layer, backend="sparsec", fullgraph=True, options={"dense": "aten"})
    x = rows_of(layer, 9).requires_grad_()
    weight = torch.randn_like(x)
    both = list[dict[str, Tensor]]()
    for run in (layer, compiled):
        both.append(gradients(layer, lambda: weight.mul(run(x)).sum()))  # noqa: B023 (called at once)
        assert x.grad is not None
        both[-1]["x"], x.grad = x.grad, None
    assert_close(both[1], both[0])
    assert banks == [1]


def test_steps_are_those_of_eager_training(banks: list[int]) -> None:
    """Five steps of AdamW: the same losses, which go down."""
    ids = tiny.ids(2, 12)
    losses: list[list[float]] = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="sparsec", options={"dense": "aten"})):
        model = tiny.model("mixtral").train()
        run, optimizer = wrap(model), torch.optim.AdamW(model.parameters(), 1e-2)
        losses.append([])
        for _ in range(5):
            optimizer.zero_grad()
            loss = run(ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1][-1] < losses[1][0] - 0.5
    assert banks == [2]


def test_frozen_experts_get_no_gradient(banks: list[int]) -> None:
    model = tiny.model("mixtral").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    compiled = torch.compile(model, backend="sparsec", options={"dense": "aten"})
    ids = tiny.ids(2, 9)
    wanted = gradients(model, lambda: model(ids, labels=ids, use_cache=False).loss)
    got = gradients(model, lambda: compiled(ids, labels=ids, use_cache=False).loss)
    assert not any("experts" in name for name in got)
    assert_close(got, wanted)
    assert banks == [2]


class _Stopped(nn.Module):
    """A layer whose router sees detached tokens, and whose result is doubled by what is computed under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = hand_written("MaskedSum")
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x * self.scale.detach())
        with torch.no_grad():
            factor = y.abs().mean() * self.scale
        return y * factor


def test_where_gradients_end(banks: list[int]) -> None:
    model = _Stopped()
    compiled = torch.compile(model, backend="sparsec", options={"dense": "aten"})
    x = rows_of(model.layer, 6)
    wanted = gradients(model, lambda: model(x).square().sum())
    got = gradients(model, lambda: compiled(x).square().sum())
    assert "scale" not in wanted
    assert_close(got, wanted)
    assert banks == [1]


def test_random_numbers_are_those_of_eager(banks: list[int]) -> None:
    """Two dropouts of the same tensor stay two."""
    layer, drop = hand_written("MaskedSum"), nn.Dropout(0.5)
    x = rows_of(layer, 7)

    def loss(run: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(3)
        return run(x).square().sum()

    def dropped(x: Tensor) -> Tensor:
        return drop(layer(x)) + drop(layer(x)) * drop(x)

    compiled = torch.compile(dropped, backend="sparsec", options={"dense": "aten"})
    wanted = gradients(layer, lambda: loss(dropped))
    assert_close(gradients(layer, lambda: loss(compiled)), wanted)
    assert banks[0] >= 1


def test_dense_rest_by_inductor(banks: list[int]) -> None:
    layer = hand_written("MaskedSum")
    compiled = torch.compile(layer, backend="sparsec", fullgraph=True)
    x = rows_of(layer, 10)
    assert_close(
        gradients(layer, lambda: compiled(x).square().sum()), gradients(layer, lambda: layer(x).square().sum())
    )
    assert banks == [1]


def test_a_dense_graph_is_left_alone(banks: list[int]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    x = torch.randn(3, 4)
    compiled = torch.compile(model, backend="sparsec", options={"dense": "aten"})
    wanted = gradients(model, lambda: model(x).sum())
    assert_close(gradients(model, lambda: compiled(x).sum()), wanted)
    assert banks == [0]
