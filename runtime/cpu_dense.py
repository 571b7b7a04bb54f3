"""Dense operators on a CPU, called in the way in which PyTorch runs them fastest.

One row times a bf16 matrix is a product of a matrix and a vector: it reads the weight as it lies, a fifth faster than
the general product. Attention leaves out the keys at the ends that a mask hides from all queries, such as the empty
slots of a key/value cache, and gives no mask where what is left of it hides nothing or the future only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.runtime.operators import slots_of
from sparsec.runtime.plan import Call

ATTENTION = "aten.scaled_dot_product_attention.default"
LINEAR = "aten.linear.default"


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`aten.linear` of x [..., K] and weight [N, K] without a bias."""
    if x.dtype is torch.bfloat16 and x.numel() == x.shape[-1] and weight.dim() == 2:
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    return torch.nn.functional.linear(x, weight)


@dataclass(frozen=True)
class Visible:
    """What a mask [..., queries, keys] shows.

    Args:
        mask: the mask itself.
        start, end: the keys that some query sees lie between; both 0 where that is not known or there are none.
        rest: "all" if every query sees all of them, "past" if query i sees the first i + 1, else "some".
    """

    mask: Tensor
    start: int
    end: int
    rest: str

    @classmethod
    def of(cls, mask: Tensor) -> Visible:
        if mask.dtype is not torch.bool or mask.dim() < 2 or mask.numel() == 0:
            return cls(mask, 0, 0, "some")
        queries, keys = mask.shape[-2:]
        seen = mask.reshape(-1, keys).amax(0).nonzero()
        if seen.shape[0] == 0:
            return cls(mask, 0, 0, "some")
        start, end = int(seen[0]), int(seen[-1]) + 1
        part = mask[..., start:end]
        if bool(part.all()):
            return cls(mask, start, end, "all")
        past = queries == end - start and bool((part == torch.ones_like(part).tril()).all())
        return cls(mask, start, end, "past" if past else "some")

    def attend(self, run: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`run(query, key, value, mask, is_causal=...)` on the keys that are seen."""
        if self.end == 0 or self.mask.shape[-1] != key.shape[-2]:
            return run(query, key, value, self.mask)
        if self.end - self.start < key.shape[-2]:
            key = key.narrow(-2, self.start, self.end - self.start)
            value = value.narrow(-2, self.start, self.end - self.start)
        if self.rest == "some":
            return run(query, key, value, self.mask[..., self.start : self.end])
        return run(query, key, value, None, is_causal=self.rest == "past")


def hides(step: Call) -> int | None:
    """The slot of the mask, for a call of attention that may leave out what it hides."""
    slots = [slot for tree in step.args for slot in slots_of(tree)]
    usual = step.op == ATTENTION and len(step.outs) == 1 and step.kwargs.keys() <= {"scale", "enable_gqa"}
    return slots[3] if usual and len(slots) == len(step.args) == 4 else None


def is_new(step: Call, op: torch._ops.OpOverload, new: Collection[int]) -> bool:
    """Whether a call's result is a tensor of its own, which no later step changes, or a view of one in slots `new`."""
    returns = op._schema.returns
    if len(step.outs) != 1 or len(returns) != 1:
        return False
    alias: Any = returns[0].alias_info
    if alias is None:
        return True
    return not alias.is_write and all(slot in new for tree in step.args[:1] for slot in slots_of(tree))
