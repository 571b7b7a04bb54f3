"""What the cost model chooses for, and among: the sizes of an expert GEMM, and the variants of its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sparsec.ir.types import DType
from sparsec.passes.chips import Chip

Family: TypeAlias = Literal["tiles", "tma", "swap", "persistent", "gathered", "rows", "fp8"]
"""The families of kernels, as of `codegen/triton/families.py`."""

ROW_REGISTERS = 48  # registers of a thread that every kernel takes
# Registers of a thread of `rows`, going up and going down, and for each product that it makes in a step.
OF_ROWS = {"plain": (48, 96, 1.2), "fp8": (40, 80, 0.5), "mxfp4": (48, 48, 0.95)}
# Registers of a thread of `swap` that widens weights: for all, for each sum, and for each weight and each value of the
# rows in a step.
WIDENED = {"fp8": (20, 2.4, 0.5, 0.4), "mxfp4": (30, 1.65, 0.47, 0.25)}
HELD = 0.4  # of a step's operands: how much is in registers at a time where instructions are of 32 lanes
DIVIDED = 4  # warps of a persistent program whose work Triton divides into fetching and multiplying
WEIGHT_SIZES = {"fp8": 1 + 4 / 128**2, "mxfp4": 0.5 + 1 / 32}  # bytes, with a share of the scales


@dataclass(frozen=True)
class Gemm:
    """A grouped GEMM: T * k rows in `experts` groups, [rows, inner] by [inner, parts * columns].

    Args:
        half: `up` gathers rows of x; `down` reads rows in order and leaves the sum of k rows for each token.
        inner, columns, parts: `columns` of the result, each of which needs `parts` columns of weights.
        dtype: of activations, and of the products.
        packing: how the weights lie in memory (`moe.gather_gemm`).
        activations: how rows are rounded by a launch in front (`moe.gather_gemm`).
        launches: kernels that it takes besides the GEMM: one where k rows are added, or a tail finishes them.
        transposed: whether `columns` are next to each other in the weights, not `inner`.
        tail: whether whole rows go through a region before they are added.
        listed: whether a list of tiles comes with the op.
    """

    half: Literal["up", "down"]
    experts: int
    k: int
    inner: int
    columns: int
    parts: int
    dtype: DType
    launches: int = 0
    packing: str = "plain"
    transposed: bool = False
    tail: bool = False
    listed: bool = True
    activations: str = "model"

    @property
    def weight_size(self) -> float:
        """Bytes of one weight, with its share of the scales."""
        return WEIGHT_SIZES.get(self.packing, self.dtype.itemsize)

    @property
    def weights(self) -> float:
        """Bytes of one expert's weights."""
        return self.columns * self.parts * self.inner * self.weight_size

    @property
    def slots(self) -> int:
        """Experts of a token that are computed side by side: k, padded."""
        return 1 << (self.k - 1).bit_length()


def as_text(variant: Mapping[str, Any]) -> str:
    """A variant for people: of its fields, or of what an artifact says of it."""
    parts = f" / {variant['split']}" if variant.get("split", 1) > 1 else ""
    tile = " x ".join(str(variant[f"block_{side}"]) for side in "mnk")
    return f"{variant['kernel']} {tile}{parts}, {variant['num_warps']} warps, {variant['num_stages']} stages"


@dataclass(frozen=True)
class Variant:
    """One way to compute a GEMM: a family of kernels, its tile, warps per program, stages of loads, parts of K.

    `block_m` counts rows of the result, `block_n` columns of it, whichever side of the tensor core they are on.
    """

    kernel: Family
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split: int = 1

    def __str__(self) -> str:
        return as_text(vars(self))

    @property
    def stays(self) -> bool:
        """Whether its programs go over many tiles, all of whose operands come by the copy engine."""
        return self.kernel in ("persistent", "gathered")

    def first(self, gemm: Gemm) -> int:
        """Rows of the tensor cores' first operand: the weights' columns in `swap`, of both kinds where it widens."""
        if self.kernel != "swap":
            return self.block_m
        return self.block_n * (gemm.parts if self.widens(gemm) else 1)

    def widens(self, gemm: Gemm) -> bool:
        """Whether the matrix instruction takes weights from the registers in which they are widened."""
        return self.kernel == "swap" and gemm.packing != "plain"

    def direct(self, gemm: Gemm, on: Chip) -> bool:
        """Whether the matrix instruction is the one that reads shared memory: both operands, or the second at least."""
        return 0 < on.wide <= self.first(gemm) and (gemm.dtype is not DType.f32 or self.kernel == "fp8")

    def order(self, gemm: Gemm, on: Chip) -> str:
        """What decides the order in which a row's terms are added: variants of one order give the same bits."""
        if self.kernel == "rows" or (gemm.dtype is DType.f32 and self.kernel != "fp8"):
            return f"{self.kernel} {self.block_k} / {self.split}"
        of, place = "fp8 " if self.kernel == "fp8" else "", "shared memory" if self.direct(gemm, on) else "registers"
        scaled = f", scaled by {self.block_k}" if gemm.packing == "fp8" else ""
        return f"{of}matrix instruction on {place} / {self.split}{scaled}"

    def step(self, gemm: Gemm) -> int:
        """Bytes of operands that one step of the inner loop loads."""
        weights = self.block_n * gemm.parts * gemm.weight_size
        return int((self.block_m * self.row_size(gemm) + weights) * self.block_k)

    def row_size(self, gemm: Gemm) -> float:
        """Bytes of one value of the rows, with its share of the scales."""
        return 1 + 4 / 128 if self.kernel == "fp8" else gemm.dtype.itemsize

    def shared(self, gemm: Gemm, on: Chip) -> int:
        """Bytes of shared memory of one program: a stage that is in registers takes none; barriers where TMA loads."""
        if self.kernel == "rows":
            return int((self.num_stages - 1) * self.products(gemm) * gemm.weight_size) + 4096
        stages = self.num_stages if self.direct(gemm, on) else self.num_stages - 1
        spare = 256 if self.kernel != "tiles" or self.direct(gemm, on) else 0
        if gemm.packing != "plain":  # scales on their way to all threads
            spare += 2048 if self.widens(gemm) else 4 * self.block_n * gemm.parts
        if gemm.packing != "plain" and self.kernel != "fp8" and self.direct(gemm, on):
            # A stage of weights is in registers. What `tiles` make of it goes back.
            rows = int(self.block_m * self.row_size(gemm) * self.block_k)
            widened = 0 if self.widens(gemm) else self.block_n * gemm.parts * self.block_k * gemm.dtype.itemsize
            return self.num_stages * rows + (self.num_stages - 1) * (self.step(gemm) - rows) + widened + spare
        if self.stays:
            spare += self.block_m * min(128, self.block_n) * gemm.dtype.itemsize  # results on their way out
        return stages * self.step(gemm) + spare

    def piece(self, gemm: Gemm) -> float:
        """Bytes of weights of a step that lie together in memory."""
        if gemm.packing == "mxfp4":  # what columns have of a block of 128
            return self.block_n * 128 * gemm.weight_size
        return (self.block_n if gemm.transposed else self.block_k) * gemm.weight_size

    def products(self, gemm: Gemm) -> int:
        """Weights that one step of `rows` meets: those of a token's k experts in the down-projection."""
        return self.block_n * self.block_k * (gemm.parts if gemm.half == "up" else gemm.slots)

    def registers(self, gemm: Gemm, on: Chip) -> float:
        """Registers of a thread: sums, addresses of what it stores and loads, operands on their way; fitted to what
        ptxas makes of the kernels."""
        threads = self.num_warps * on.lanes
        if self.kernel == "rows":
            up, down, each = OF_ROWS[gemm.packing]
            return (up if gemm.half == "up" else down) + each * self.block_m * self.products(gemm) / threads
        if self.widens(gemm):
            always, total, weight, row = WIDENED[gemm.packing]
            m, n, k = self.block_m, self.first(gemm), self.block_k
            return always + (total * m * n + weight * n * k + row * m * k) / threads
        if self.stays:
            threads = 256  # two groups of warps share the products
        sums = self.block_m * self.block_n * gemm.parts / threads
        stored = self.block_m * self.block_n * gemm.dtype.itemsize / 8 / threads
        pointed = self.block_n * gemm.parts * gemm.weight_size if self.kernel in ("tiles", "fp8") else 0
        pointed += 0 if self.stays else self.block_m * self.row_size(gemm)
        loaded = pointed * self.block_k / 8 / threads
        if on.lanes == 64:  # loads go through registers
            loaded += (self.num_stages - 1) * self.step(gemm) / 4 / threads
        held = 0 if self.direct(gemm, on) else self._held(gemm, threads, on)
        if gemm.packing == "fp8":  # products of a block, before they are scaled
            held += 1.6 * sums / gemm.parts
        elif gemm.packing == "mxfp4":
            held += 0.3 * sums
        return ROW_REGISTERS + sums + stored + loaded + held

    def _held(self, gemm: Gemm, threads: int, on: Chip) -> float:
        """Registers for operands of a step, of which each warp has its own."""
        warps_m = min(threads // on.lanes, max(1, self.block_m // 32))
        warps_n = threads // on.lanes // warps_m
        operands = self.block_m * warps_n + self.block_n * gemm.parts * warps_m
        size = self.row_size(gemm)
        return (HELD if on.lanes == 32 else 1.0) * operands * self.block_k * size / 4 / threads
