"""`sparsec.ops`: every way to write a bank against a loop over tokens, and what does not fit in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsec import ops
from sparsec.diagnostics import CompileError
from sparsec.frontend.capture import capture
from tests.frontend.helpers import outputs, relative_error

T, H, WIDTH, E, K = 6, 8, 5, 4, 2
RNG = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=RNG) * 0.4


X, GATE, UP, DOWN = normal(T, H), normal(E, WIDTH, H), normal(E, WIDTH, H), normal(E, H, WIDTH)
GATE_BIAS, UP_BIAS, DOWN_BIAS = normal(E, WIDTH), normal(E, WIDTH), normal(E, H)
IDS = torch.stack([torch.randperm(E + 1, generator=RNG)[:K] for _ in range(T)])  # E is skipped
WEIGHTS = torch.rand(T, K, generator=RNG)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def by_hand(biases: bool = False, gated: bool = True, early: bool = False, tail: Any = None) -> Tensor:
    """Token by token, slot by slot."""
    out = torch.zeros(T, H)
    for t in range(T):
        for e, w in zip(IDS[t].tolist(), WEIGHTS[t], strict=True):
            if e == E:
                continue
            x = X[t] * w if early else X[t]
            up = UP[e] @ x + (UP_BIAS[e] if biases else 0)
            h = swiglu(GATE[e] @ x + (GATE_BIAS[e] if biases else 0), up) if gated else F.relu(up)
            y = DOWN[e] @ h + (DOWN_BIAS[e] if biases else 0)
            y = y if tail is None else tail(y)
            out[t] += y if early else w * y
    return out


def interleave(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], 2).flatten(1, 2)


BIASES = {"gate_bias": GATE_BIAS, "up_bias": UP_BIAS, "down_bias": DOWN_BIAS}
FORMS: dict[str, tuple[dict[str, Any], Tensor]] = {
    "separate": ({"up": UP, "gate": GATE, "down": DOWN}, by_hand()),
    "lists": ({"up": [*UP], "gate": nn.ParameterList([*GATE]), "down": tuple(DOWN)}, by_hand()),
    "one weight": ({"up": torch.cat([GATE, UP], 1), "down": DOWN}, by_hand()),
    "interleaved": ({"up": interleave(GATE, UP), "down": DOWN, "interleaved": True}, by_hand()),
    "transposed": (
        {"up": UP.mT, "gate": GATE.mT, "down": DOWN.mT, "up_transposed": True, "down_transposed": True},
        by_hand(),
    ),
    "biases": ({"up": UP, "gate": GATE, "down": DOWN, **BIASES}, by_hand(biases=True)),
    "no gate": ({"up": UP, "down": DOWN, "activation": F.relu}, by_hand(gated=False)),
    "input": ({"up": UP, "gate": GATE, "down": DOWN, "weight_on": "input"}, by_hand(early=True)),
    "glu": ({"up": UP, "gate": GATE, "down": DOWN, "activation": ops.glu(F.silu)}, by_hand()),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_bank_in_every_form(form: str) -> None:
    given, expected = FORMS[form]
    whole: dict[str, Any] = {"activation": swiglu, **given}
    y = ops.experts(X, IDS, WEIGHTS, **whole)
    assert relative_error(y, expected) < 1e-6


def test_leading_dimensions_are_tokens() -> None:
    y = ops.experts(X.view(2, 3, H), IDS, WEIGHTS, UP, DOWN, gate=GATE, activation=swiglu)
    assert y.shape == (2, 3, H)
    assert relative_error(y.view(T, H), by_hand()) < 1e-6


@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_a_norm_is_a_tail_with_its_own_weights(kind: Any) -> None:
    norm = kind(H)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter)
    y = ops.experts(X, IDS, WEIGHTS, UP, DOWN, gate=GATE, activation=swiglu, tail=norm)
    assert relative_error(y, by_hand(tail=norm)) < 1e-6


def test_a_tail_is_given_what_else_it_reads() -> None:
    scale = torch.linspace(1, 2, H)
    y = ops.experts(
        X, IDS, WEIGHTS, UP, DOWN, gate=GATE, activation=swiglu, tail=lambda y, s: y * s, tail_params=[scale]
    )
    assert relative_error(y, by_hand(tail=lambda y: y * scale)) < 1e-6


def test_it_is_captured_as_one_op() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.norm = nn.Linear(H, E), nn.RMSNorm(H)
            self.ups, self.downs = nn.ParameterList([*UP]), nn.ParameterList([*DOWN])

        def forward(self, x: Tensor) -> Tensor:
            weights, ids = self.router(x).softmax(-1).topk(K)
            ids = ops.capacity(ids, E, -(-x.shape[0] // 2), order="token")
            y = ops.experts(x, ids, weights, self.ups, self.downs, activation=F.relu, tail=self.norm)
            return y + ops.grouped_linear(x, ids, [w[:, :H] for w in self.wide()], weights=weights)

        def wide(self) -> list[Tensor]:
            return [up.mT @ up for up in self.ups]

    layer = Layer().eval()
    captured = capture(layer, (X,))
    assert [op.name for op in captured.module.main.body.ops if op.dialect == "moe"] == [
        "moe.capacity",
        "moe.experts",
        "moe.grouped_linear",
    ]
    for tokens in (2, 7, 40):
        x = normal(tokens, H)
        with torch.no_grad():
            assert relative_error(outputs(captured, x)[0], layer(x)) < 1e-5


@pytest.mark.parametrize("rows", [X, X.unsqueeze(1).expand(T, K, H)])
def test_grouped_linear(rows: Tensor) -> None:
    bias, used = normal(E, WIDTH), (IDS < E).unsqueeze(-1)
    each = torch.einsum("th,tkih->tki", X, UP[IDS.clamp(max=E - 1)]) + bias[IDS.clamp(max=E - 1)]
    each = torch.where(used, each, 0.0)
    assert relative_error(ops.grouped_linear(rows, IDS, UP, bias), each) < 1e-6
    assert relative_error(ops.grouped_linear(rows, IDS, [*UP.mT], bias, transposed=True), each) < 1e-6
    summed = (each * WEIGHTS.unsqueeze(-1)).sum(1)
    assert relative_error(ops.grouped_linear(rows, IDS, UP, bias, weights=WEIGHTS), summed) < 1e-6


def test_capacity_counts_by_slot_or_by_token_and_group_by_group() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [0, 1], [9, 0]])
    assert ops.capacity(ids, 2, 2).tolist() == [[0, 1], [1, 2], [0, 2], [9, 2]]
    assert ops.capacity(ids, 2, 2, order="token").tolist() == [[0, 1], [1, 0], [2, 2], [9, 2]]
    assert ops.capacity(ids, 2, 1, groups=2).tolist() == [[0, 2], [1, 2], [0, 1], [9, 2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": UP[:3]}, r"gate is \[4, 5, 8\], up \[3, 5, 8\]"),
        ({"gate": None, "up": normal(E, 3 * WIDTH, H)}, "up gives 15 columns and down takes 5: expected 5, or 10"),
        ({"interleaved": True}, "leave out `gate`"),
        ({"up_bias": UP_BIAS}, "bias both or none"),
    ],
)
def test_shapes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"up": UP, "down": DOWN, "gate": GATE, "activation": swiglu} | changes
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.experts(X, IDS, WEIGHTS, **given)


def test_functions_that_no_region_holds() -> None:
    with pytest.raises(CompileError, match=r"not pointwise .* reads a tensor of shape \(4, 5\)"):
        ops.experts(X, IDS, WEIGHTS, UP, DOWN, activation=lambda up: up * UP_BIAS[0])
    with pytest.raises(CompileError, match="mixes rows"):
        ops.experts(X, IDS, WEIGHTS, UP, DOWN, activation=F.relu, tail=lambda y: y - y.mean(0))
    with pytest.raises(CompileError, match="tail_params"):
        ops.experts(X, IDS, WEIGHTS, UP, DOWN, activation=F.relu, tail=lambda y: y * DOWN_BIAS[0])
