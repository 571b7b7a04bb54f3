"""What dispatch and combine do, in plain torch: all that ranks exchange is seen by each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

Sent: TypeAlias = "list[tuple[Tensor, Tensor]]"
"""For each rank the tokens that rows go back to, and the rows."""


class Dispatched:
    """A dispatch as one rank sees it.

    Args:
        given: of each rank x [T, H], where [T, k] and weights [T, k].
        rank: this one.
        slots: S, of each rank.
        single: whether each row has one slot, not the token's choices.
        payload: how rows travel.
    """

    def __init__(
        self, given: Sequence[tuple[Tensor, Tensor, Tensor]], rank: int, slots: int, single: bool, payload: str
    ) -> None:
        self.given, self.rank, self.slots, self.single, self.payload = given, rank, slots, single, payload

    @property
    def tokens(self) -> int:
        """How many this rank has of its own."""
        return int(self.given[self.rank][0].shape[0])

    def here(self, where: Tensor) -> Tensor:
        """Which slots [T, k] are of this rank."""
        first = self.rank * self.slots
        return (where >= first) & (where < first + self.slots)

    def tokens_of(self, source: int) -> Tensor:
        """The tokens of a rank that come here, once for each row."""
        here = self.here(self.given[source][1])
        return here.nonzero()[:, 0] if self.single else here.any(1).nonzero()[:, 0]

    def received(self) -> tuple[Tensor, Tensor, Tensor]:
        """rows, local slots, weights."""
        import torch

        from sparsec.runtime.distributed.payload import PAYLOADS

        payload = PAYLOADS[self.payload]
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for source, (x, where, weights) in enumerate(self.given):
            here, tokens = self.here(where), self.tokens_of(source)
            local, used = torch.where(here, where % self.slots, self.slots), torch.where(here, weights, 0.0)
            if self.single:
                local, used = local[here][:, None], used[here][:, None]
            else:
                local, used = local[tokens], used[tokens]
            parts.append((payload.decode(payload.encode(x[tokens]), x.dtype, x.shape[1]), local, used))
        rows, slots, weights = (torch.cat(column) for column in zip(*parts, strict=True))
        return rows, slots, weights


def splits(rows: Tensor, dispatched: Dispatched) -> Sent:
    """What a rank sends back: for each rank its tokens and the rows for them."""
    tokens = [dispatched.tokens_of(source) for source in range(len(dispatched.given))]
    return list(zip(tokens, rows.split([len(of) for of in tokens]), strict=True))


def combine(given: Sequence[Sent], dispatched: Dispatched) -> Tensor:
    """[T, N]: the rows for a rank's own tokens, of what all ranks send back, added in the order of ranks."""
    import torch

    first = given[0][dispatched.rank][1]
    out = torch.zeros(dispatched.tokens, first.shape[1], dtype=torch.float32)
    for sent in given:
        tokens, rows = sent[dispatched.rank]
        out.index_add_(0, tokens, rows.float())
    return out.to(first.dtype)


def rows_sent(k: int, ranks: int, width: int, dedup: str, algo: str) -> tuple[float, float]:
    """Rows that one token sends inside its node and to other nodes, if it chooses k slots independently of each other.

    A row to the own rank is not sent. With two levels a row to another node goes over the network to the rank of the
    own number there, and from it inside, unless it has arrived.
    """
    nodes = ranks // width
    copies = float(k) if dedup == "none" else ranks * (1 - (1 - 1 / ranks) ** k)
    across = nodes * (1 - (1 - 1 / nodes) ** k) if dedup == "node" else copies
    outside = across * (nodes - 1) / nodes
    inside = copies * (width - 1) / (width if algo == "two_level" else ranks)
    return inside, outside
