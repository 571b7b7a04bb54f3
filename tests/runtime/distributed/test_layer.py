"""Training with sharded banks on 4 processes, against one process that has all experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsec.runtime.distributed import Dispatch, World, experts_layer, same_gradients
from tests.codegen.triton.gradients import Bank
from tests.runtime.distributed.ranks import Ranks
from tests.runtime.distributed.test_exchange import EXPERTS, RANKS, SHARES, SLOTS, VARIANTS, H, S, mine, tokens

LENGTHS, K, INNER = (10, 0, 17, 13), 3, 8


def banks() -> tuple[Tensor, Tensor, Tensor]:
    """up, down of all experts, and the matrix of a shared expert."""
    made = torch.Generator().manual_seed(2)
    up = torch.randn(EXPERTS, 2 * INNER, H, generator=made) / H**0.5
    return up, torch.randn(EXPERTS, H, INNER, generator=made) / INNER**0.5, torch.randn(H, H, generator=made) / H


def descend(*tensors: Tensor) -> None:
    """A step of SGD. (`torch.optim` takes seconds to load.)"""
    for tensor in tensors:
        assert tensor.grad is not None
        tensor.data -= 0.05 * tensor.grad


def layer_case(world: World, policy: str, dedup: str, algo: str, steps: int) -> dict[str, Tensor]:
    """Some steps of SGD on the banks; the last step's results and gradients."""
    up, down, shared = banks()
    held = SLOTS[world.rank * S : world.rank * S + S]
    up, down = up[held].requires_grad_(), down[held].requires_grad_()
    shared.requires_grad_()
    x, ids, weights = mine(world, LENGTHS, *tokens(LENGTHS, K, "random"))
    x.requires_grad_()
    weights.requires_grad_()
    out = x
    for step in range(steps):
        out = experts_layer(
            world, x, ids, weights, up, down, SLOTS, SHARES, experts=EXPERTS, policy=policy, dedup=dedup, algo=algo,
            meanwhile=lambda rows: rows @ shared,
        )  # fmt: skip
        for tensor in (x, weights, up, down, shared):
            tensor.grad = None
        (torch.cos(out).sum() / 10).backward()
        if step < steps - 1:
            descend(up, down)
    grads = {"x": x.grad, "weights": weights.grad, "up": up.grad, "down": down.grad, "shared": shared.grad}
    return {"out": out.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}


@pytest.mark.parametrize(("dedup", "algo"), VARIANTS)
def test_training_equals_one_process(ranks: Ranks, dedup: str, algo: str) -> None:
    up, down, shared = (bank.requires_grad_() for bank in banks())
    x, ids, weights = tokens(LENGTHS, K, "random")
    x.requires_grad_()
    weights.requires_grad_()
    out = x
    for step in range(2):
        for tensor in (x, weights, up, down, shared):
            tensor.grad = None
        hidden = torch.einsum("th,eih->tei", x, up)
        y = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(hidden[..., :INNER]) * hidden[..., INNER:], down)
        out = x @ shared
        for pick in range(K):
            valid = (ids[:, pick] >= 0) & (ids[:, pick] < EXPERTS)
            row = torch.arange(len(x))
            picked = y[row, ids[:, pick].clamp(0, EXPERTS - 1)] * weights[:, pick, None]
            out = out + torch.where(valid[:, None], picked, 0)
        (torch.cos(out).sum() / 10).backward()
        if step == 0:
            descend(up, down)
    assert x.grad is not None and weights.grad is not None and shared.grad is not None
    assert up.grad is not None and down.grad is not None
    for policy in ("static", "batch"):
        answers = ranks.run(layer_case, policy, dedup, algo, 2)
        for name, want in (("out", out.detach()), ("x", x.grad), ("weights", weights.grad)):
            assert torch.allclose(torch.cat([answer[name] for answer in answers]), want, rtol=0, atol=1e-5), name
        assert torch.allclose(
            torch.stack([answer["shared"] for answer in answers]).sum(0), shared.grad, rtol=0, atol=1e-5
        )
        for name, want in (("up", up.grad), ("down", down.grad)):
            found = torch.cat([answer[name] for answer in answers])
            assert torch.allclose(found, want[SLOTS], rtol=0, atol=1e-5), name
            for expert in range(EXPERTS):  # replicas stay alike, bit for bit
                copies = found[expert == SLOTS]
                assert all(torch.equal(copy, copies[0]) for copy in copies)
    assert len(SLOTS) == RANKS * S


@pytest.mark.parametrize("tokens_here", [9, 0])
def test_generated_kernels_as_the_local_bank(tokens_here: int) -> None:
    """`sparsec::bank` in place of PyTorch operators; weights of skipped picks may be anything."""
    bank = Bank(EXPERTS, K, 16, 24)
    ids = torch.randint(-1, EXPERTS, (tokens_here, K), generator=torch.Generator().manual_seed(3))
    given = bank.operands(ids)
    slots, shares = torch.arange(EXPERTS), torch.ones(EXPERTS)

    def generated(rows: Tensor, local: Tensor, weights: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.ops.sparsec.bank(rows, local, weights, up, down, None, None, **bank.options)[0]

    found: list[list[Tensor]] = []
    for run in (generated, None):
        leaves = [tensor.clone().requires_grad_() for tensor in given.values() if tensor is not None]
        x, weights, up, down = leaves
        out = experts_layer(World.of(), x, ids, weights, up, down, slots, shares, experts=EXPERTS, run=run)
        torch.cos(out).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(found[0]) == len(found[1]) == 5
    for by_kernels, plain in zip(*found, strict=True):
        assert torch.allclose(by_kernels, plain, rtol=1e-5, atol=1e-5)


def test_replicas_on_one_rank_get_the_same_gradient() -> None:
    bank = torch.ones(3, 2, requires_grad=True)
    (same,) = same_gradients(World.of(), torch.tensor([0, 1, 0]), bank)
    (same * torch.tensor([[1.0], [2.0], [4.0]])).sum().backward()
    assert bank.grad is not None
    assert bank.grad.tolist() == [[5, 5], [2, 2], [5, 5]]


class _Noted(torch.autograd.Function):
    """Adds to a list when it is run backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, notes: list[str]) -> Tensor:
        ctx.notes = notes
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        ctx.notes.append("shared")
        return grad_outputs[0], None


def test_backward_too_something_runs_while_rows_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = list[str]()
    for name in ("begin", "finish", "back_begin", "back_finish"):
        method = getattr(Dispatch, name)

        def noted(self: Dispatch, *args: Tensor, name: str = name, method: Any = method) -> Any:
            notes.append(name)
            return method(self, *args)

        monkeypatch.setattr(Dispatch, name, noted)
    up, down, _ = (bank.requires_grad_() for bank in banks())
    x, ids, weights = tokens((6,), K, "random")
    x.requires_grad_()
    out = experts_layer(
        World.of(), x, ids, weights, up, down, torch.arange(EXPERTS), torch.ones(EXPERTS), experts=EXPERTS,
        meanwhile=lambda rows: _Noted.apply(rows, notes),
    )  # fmt: skip
    out.sum().backward()
    assert notes == ["begin", "finish", "back_begin", "shared", "back_finish"]
