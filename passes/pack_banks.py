"""Lay banks of experts out as kernels read them, and quantise them if asked to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from sparsec.diagnostics import CompileError
from sparsec.dialects.moe import (
    TILE_DTYPES,
    ExpertBank,
    Experts,
    GatherGemm,
    GemmCombine,
    Layer,
    Pack,
    PackBias,
    Scales,
)
from sparsec.ir.core import Argument, Attr, Module, Op, Value
from sparsec.ir.equal import clone_block
from sparsec.ir.opdef import OpDef
from sparsec.ir.types import DType
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.derivations import Deriver

WEIGHTS = {"model": "tiles", "int8": "int8", "int4": "int4"}
"""The packings of banks on a CPU, by how weights are to be stored."""

BLOCKS = ("fp8", "mxfp4")
"""How weights can be stored on a GPU, besides as the model has them."""

BLOCK_DTYPES = (DType.bf16, DType.f16, DType.f32)
"""Dtypes of rows and of banks that can be packed for a GPU."""

ACTIVATIONS = {"model": (*WEIGHTS, *BLOCKS), "int8": ("int8", "int4"), "fp8": ("fp8",)}
"""What banks can be multiplied by: rows as they are, or rounded as they come; with which weights."""

_Key: TypeAlias = tuple[Value, str, tuple[Attr, ...]]


@register
@dataclass(frozen=True)
class PackBanks(Pass):
    """Give `moe.experts` and `moe.layer` on a CPU banks in tiles, as derived weights; quantised ones get scales too.
    Give `moe.gather_gemm` and `moe.gemm_combine` on a GPU banks of fp8 or mxfp4 if asked to.

    Banks must be weights that nothing changes, on a CPU of the dtype of the rows, bf16 or f32, and no other op may read
    them; else they stay as they are and a remark says why. A bank that is derived already, such as a stack of experts,
    is packed by the function that makes it. The module's attributes `weights` (`model`; `int8`, `int4` on a CPU; `fp8`,
    `mxfp4` on a GPU) and `activations` (`model`; `int8` on a CPU; `fp8` on a GPU) come before the options.
    """

    name: ClassVar[str] = "pack-banks"
    weights: str = "model"  #: model packs values as they are (on a GPU: not at all); all others quantise them
    activations: str = "model"  #: int8 or fp8 rounds what quantised banks are multiplied by as it comes

    def run(self, module: Module, ctx: PassContext) -> None:
        weights = str(module.attrs.get("weights", self.weights))
        if weights not in (*WEIGHTS, *BLOCKS):
            raise CompileError(f"weights are stored as {', '.join((*WEIGHTS, *BLOCKS))}, not as '{weights}'")
        activations = str(module.attrs.get("activations", self.activations))
        if activations not in ACTIVATIONS:
            raise CompileError(f"activations are {', '.join(ACTIVATIONS)}, not '{activations}'")
        cpu = ctx.target == "cpu"
        if weights not in (WEIGHTS if cpu else ("model", *BLOCKS)):
            place, there = ("GPUs", "int8 and int4") if cpu else ("target cpu", "fp8 and mxfp4")
            raise CompileError(f"{weights} weights are for {place}, not for {ctx.target}, which has {there}")
        if weights not in (fitting := ACTIVATIONS[activations]):
            place = "a GPU" if activations in BLOCKS else "a CPU"
            wanted = f"{' or '.join(fitting)} weights on {place}: choose those too (--weights {fitting[0]})"
            raise CompileError(f"{activations} activations go with {wanted}")
        if not cpu and weights == "model":
            return
        deriver = Deriver(module)
        packer = (
            _TilePacker(deriver, WEIGHTS[weights], activations) if cpu else _BlockPacker(deriver, weights, activations)
        )
        count = 0
        for op in list(module.main.body.ops):
            if not isinstance(op, packer.kinds) or op.attrs.get("packing", "plain") != "plain":
                continue
            if (why := next(packer.obstacles(op), None)) is None:
                packer.pack(op)
                count += 1
            elif weights == "model":
                ctx.missed(op, why=f"the banks stay as they are: {why}")
            else:
                ctx.missed(op, why=f"the banks stay as they are, not {weights}: {why}")
        if count:
            deriver.sweep()
            ctx.changed("banks packed", count)


@dataclass
class _Packer(ABC):
    """Packs the banks of ops, each bank once."""

    kinds: ClassVar[tuple[type[Op], ...]]  #: the ops whose banks it packs
    deriver: Deriver
    packing: str
    activations: str
    packed: dict[_Key, Value] = field(default_factory=dict[_Key, Value], kw_only=True)

    @abstractmethod
    def obstacles(self, op: Op) -> Iterator[str]:
        """Why the banks of an op cannot be packed."""

    @abstractmethod
    def pack(self, op: Op) -> None:
        """Put an op that reads packed banks in the place of one that reads plain ones."""

    def shared(self, banks: Mapping[str, Value | None], kinds: tuple[type[Op], ...]) -> Iterator[str]:
        """Why banks cannot be packed for ops of `kinds`."""
        for name, value in banks.items():
            if value is None:
                continue
            if not self.deriver.is_fixed(value):
                yield f"{name} (%{value.name}) is no weight that stays as it is"
            for user in value.users:
                if not isinstance(user, kinds):
                    yield f"'{user.name}' reads {name} (%{value.name}) too, so packing would store it twice"

    def replace(self, op: OpDef, arguments: list[Argument], attrs: Mapping[str, Attr]) -> None:
        """Put an op that reads packed banks in the place of one that reads plain ones."""
        while arguments[-1] is None:
            arguments.pop()
        regions = [clone_block(region, {}) for region in op.regions]
        new = type(op)(arguments, None, attrs, regions, op.loc)
        assert op.block is not None
        op.block.insert_before(op, new)
        for old, result in zip(op.results, new.results, strict=True):
            result.name = old.name
            old.replace_by(result)
        op.erase()

    def says(self) -> dict[str, Attr]:
        """The attributes of an op that reads packed banks."""
        said: dict[str, Attr] = {"packing": self.packing, "activations": self.activations}
        return {name: value for name, value in said.items() if value != "model"}

    def bank(self, op: Op, bank: Value, parts: int, transposed: bool, interleaved: bool) -> tuple[Value, Value | None]:
        """A packed bank and its scales."""
        attrs: dict[str, Attr] = {"packing": self.packing, "parts": parts}
        attrs |= {"transposed": transposed, "interleaved": interleaved}
        scales = None
        if self.packing != "tiles":
            scales = self.made(Scales, op, [bank], attrs, ".scales", bank)
        return self.made(Pack, op, [bank, scales], attrs, f".{self.packing}", bank), scales

    def made(
        self,
        kind: type[Pack | PackBias | Scales],
        op: Op,
        arguments: list[Argument],
        attrs: dict[str, Attr],
        ending: str,
        bank: Value,
    ) -> Value:
        """An argument of `main` for what an op of `kind` yields; the one that there is, if it was made before."""
        key = (bank, kind.op_name, tuple(attrs.values()))
        if key not in self.packed:
            while arguments[-1] is None:
                arguments.pop()
            defaults = kind.fields().defaults
            made = kind(arguments, None, {k: v for k, v in attrs.items() if defaults.get(k) != v}, loc=op.loc)
            assert op.block is not None
            op.block.insert_before(op, made)
            self.packed[key] = self.deriver.take(made.result, ending, made.operands[1:])
        return self.packed[key]


@dataclass
class _TilePacker(_Packer):
    """Packs banks for CPUs."""

    kinds = (Experts, Layer)

    def obstacles(self, op: Op) -> Iterator[str]:
        assert isinstance(op, ExpertBank)
        given = {"up": op.up, "down": op.down, "up_bias": op.up_bias, "down_bias": op.down_bias}
        dtypes = {value.tensor.dtype for value in (op.x, op.up, op.down)}
        if len(dtypes) > 1 or not dtypes <= set(TILE_DTYPES):
            wanted = " or ".join(map(str, TILE_DTYPES))
            yield f"x is {op.x.type}, up is {op.up.type} and down is {op.down.type}; tiles need one dtype, {wanted}"
        if op.y_type.shape != op.x.tensor.shape:
            yield f"x is {op.x.type} and the result {op.y_type}; tiles need as many columns"
        if 0 in (*op.up.tensor.shape, *op.down.tensor.shape):
            yield f"up is {op.up.type} and down is {op.down.type}: there is nothing to pack"
        yield from self.shared(given, (Experts, Layer, Pack, PackBias, Scales))

    def pack(self, op: Op) -> None:
        assert isinstance(op, Experts | Layer)
        interleaved = op.layout == "interleaved"
        up = self.bank(op, op.up, op.parts, op.up_transposed, interleaved)
        down = self.bank(op, op.down, 1, op.down_transposed, False)
        biases = (self._bias(op, op.up_bias, op.parts, interleaved), self._bias(op, op.down_bias, 1, False))
        first = list(op.fields().operands).index("up")
        rest = list(op.arguments[first + 6 :])
        arguments = [*op.arguments[:first], up[0], down[0], *biases, up[1], down[1], *rest]
        dropped = ("up_transposed", "down_transposed", *(["layout"] if interleaved else []))
        attrs = {name: value for name, value in op.attrs.items() if name not in dropped}
        self.replace(op, arguments, {**attrs, **self.says()})

    def _bias(self, op: Op, bias: Value | None, parts: int, interleaved: bool) -> Value | None:
        if bias is None:
            return None
        return self.made(PackBias, op, [bias], {"parts": parts, "interleaved": interleaved}, ".packed", bias)


class _BlockPacker(_Packer):
    """Packs banks for GPUs."""

    kinds = (GatherGemm, GemmCombine)

    def obstacles(self, op: Op) -> Iterator[str]:
        assert isinstance(op, GatherGemm | GemmCombine)
        rows, name, bank, _ = _bank_of(op)
        if not {rows.tensor.dtype, bank.tensor.dtype} <= set(BLOCK_DTYPES):
            wanted = ", ".join(map(str, BLOCK_DTYPES))
            yield f"the rows are {rows.type} and {name} is {bank.type}; packed banks are for {wanted}"
        if 0 in bank.tensor.shape:
            yield f"{name} is {bank.type}: there is nothing to pack"
        yield from self.shared({name: bank}, (GatherGemm, GemmCombine, Pack, Scales))

    def pack(self, op: Op) -> None:
        assert isinstance(op, GatherGemm | GemmCombine)
        _, name, bank, transposed = _bank_of(op)
        packed, scales = self.bank(op, bank, 1, transposed, False)
        places, arguments = list(op.fields().operands), list(op.arguments)
        at = places.index(f"{name}_scale")
        arguments += [None] * (at + 1 - len(arguments))
        arguments[places.index(name)], arguments[at] = packed, scales
        attrs = {key: value for key, value in op.attrs.items() if key != f"{name}_transposed"}
        self.replace(op, arguments, {**attrs, **self.says()})


def _bank_of(op: GatherGemm | GemmCombine) -> tuple[Value, str, Value, bool]:
    """The rows, the operand that is the bank, the bank, and whether it is transposed."""
    if isinstance(op, GatherGemm):
        return op.x, "up", op.up, op.up_transposed
    return op.h, "down", op.down, op.down_transposed
