"""What is to be measured, in the order of its importance, and what a machine's roof allows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from benchmarks.shapes import Routing, Shape

Mode = Literal["forward", "training"]
MODES: tuple[Mode, ...] = get_args(Mode)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 32768)
ITEM = 2  #: bytes of a bf16 number

FIRST = (1, 64, 1024, 32768)  #: tokens that say most of an engine
SECOND = (16, 256, 4096)
TRAINED = (4096, 32768)
SKEWED = (64, 4096)


@dataclass(frozen=True)
class Cell:
    """One row of the table: a shape by name, how many tokens, how they are routed, and what is run.

    `training` is forward and backward: the gradients of rows, routing weights and both banks.
    """

    shape: str
    tokens: int
    routing: Routing
    mode: Mode

    def __str__(self) -> str:
        return f"{self.shape} T {self.tokens} {self.routing} {self.mode}"

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def calls(self) -> int:
        """Layers in one graph: enough that launching the graph does not count."""
        few = 8 if self.tokens <= 16 else 4 if self.tokens <= 256 else 2 if self.tokens <= 1024 else 1
        return few if self.mode == "forward" else 1


def cells(
    shapes: Sequence[Shape], tokens: Sequence[int], routings: Sequence[Routing], modes: Sequence[Mode]
) -> list[Cell]:
    """All combinations, the most important first; among equals by shape, then tokens, as given."""
    found = [
        Cell(shape.name, count, routing, mode)
        for routing in routings
        for mode in modes
        for count in tokens
        for shape in shapes
    ]
    return sorted(found, key=_rank)


def _rank(cell: Cell) -> int:
    if cell.routing == "uniform" and cell.mode == "forward":
        return 0 if cell.tokens in FIRST else 1 if cell.tokens in SECOND else 4
    if cell.routing == "uniform":
        return 2 if cell.tokens in TRAINED else 6
    if cell.mode == "forward":
        return 3 if cell.tokens in SKEWED else 5
    return 7


@dataclass(frozen=True)
class Work:
    """The least that a layer has to do: floating-point operations, and bytes to and from memory."""

    flops: float
    bytes: float


def work(shape: Shape, cell: Cell, hit: float, item: float = ITEM) -> Work:
    """Of `cell` where `hit` experts have rows, and a weight takes `item` bytes.

    Forward: the weights of the experts that are hit, each read once, rows read and written. Training: weights read
    twice, the gradient of every expert written, four arrays of rows; three times the operations.
    """
    expert, rows = shape.parameters * item, cell.tokens * shape.hidden * ITEM
    if cell.mode == "forward":
        return Work(shape.flops(cell.tokens), hit * expert + 2 * rows)
    return Work(3 * shape.flops(cell.tokens), (2 * hit + shape.experts) * expert + 4 * rows)


@dataclass(frozen=True)
class Roof:
    """What was measured: `tbps` of a copy, bytes read and written; `tflops` of a bf16 matmul of 8192 cubed."""

    tbps: float
    tflops: float

    def least(self, least: Work) -> tuple[float, str]:
        """Milliseconds that the machine allows, and which of its limits says so: memory or compute."""
        memory, compute = least.bytes / (self.tbps * 1e9), least.flops / (self.tflops * 1e9)
        return (memory, "memory") if memory >= compute else (compute, "compute")


def in_turn(names: Sequence[str], rounds: int) -> Iterator[tuple[int, list[str]]]:
    """The order of each round: forwards and backwards by turns, A B B A."""
    for turn in range(rounds):
        yield turn, list(names) if turn % 2 == 0 else list(reversed(names))
