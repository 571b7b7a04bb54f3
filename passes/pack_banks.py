"""Lay banks of experts out as kernels for CPUs read them, and quantise them if asked to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

from sparsec.diagnostics import CompileError
from sparsec.dialects.moe import TILE_DTYPES, ExpertBank, Experts, Layer, Pack, PackBias, Scales
from sparsec.ir.core import Argument, Attr, Module, Op, Value
from sparsec.ir.equal import clone_block
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.derivations import Deriver

WEIGHTS = {"model": "tiles", "int8": "int8", "int4": "int4"}
ACTIVATIONS = ("model", "int8")

_Key: TypeAlias = tuple[Value, str, tuple[Attr, ...]]


@register
@dataclass(frozen=True)
class PackBanks(Pass):
    """Give `moe.experts` and `moe.layer` on a CPU banks in tiles, as derived weights; quantised ones get scales too.

    Banks must be weights that nothing changes, of the dtype of the rows, bf16 or f32, and no other op may read them;
    else they stay as they are and a remark says why. A bank that is derived already, such as a stack of experts, is
    packed by the function that makes it. The module's attributes `weights` (`model`, `int8`, `int4`) and `activations`
    (`model`, `int8`) come before the options.
    """

    name: ClassVar[str] = "pack-banks"
    weights: str = "model"  #: model packs values as they are; int8 and int4 quantise them
    activations: str = "model"  #: int8 has quantised banks multiplied by rows that are rounded to int8 as they come

    def run(self, module: Module, ctx: PassContext) -> None:
        weights = str(module.attrs.get("weights", self.weights))
        if weights not in WEIGHTS:
            raise CompileError(f"weights are stored as {', '.join(WEIGHTS)}, not as '{weights}'")
        activations = str(module.attrs.get("activations", self.activations))
        if activations not in ACTIVATIONS:
            raise CompileError(f"activations are {' or '.join(ACTIVATIONS)}, not '{activations}'")
        if activations == "int8" and weights == "model":
            raise CompileError("int8 activations go with int8 or int4 weights: choose those too (--weights int8)")
        if ctx.target != "cpu":
            if weights != "model":
                raise CompileError(f"{weights} weights are for target cpu, not for {ctx.target}")
            return
        packer = _Packer(Deriver(module), WEIGHTS[weights], activations)
        count = 0
        for op in list(module.main.body.ops):
            if not isinstance(op, Experts | Layer) or op.packing != "plain":
                continue
            if (why := next(packer.obstacles(op), None)) is None:
                packer.pack(op)
                count += 1
            elif weights == "model":
                ctx.missed(op, why=f"the banks stay as they are: {why}")
            else:
                ctx.missed(op, why=f"the banks stay as they are, not {weights}: {why}")
        if count:
            packer.deriver.sweep()
            ctx.changed("banks packed", count)


@dataclass
class _Packer:
    """Packs the banks of ops, each bank once."""

    deriver: Deriver
    packing: str
    activations: str
    packed: dict[_Key, Value] = field(default_factory=dict[_Key, Value])

    def obstacles(self, op: ExpertBank) -> Iterator[str]:
        """Why the banks of an op cannot be packed."""
        given = {"up": op.up, "down": op.down, "up_bias": op.up_bias, "down_bias": op.down_bias}
        dtypes = {value.tensor.dtype for value in (op.x, op.up, op.down)}
        if len(dtypes) > 1 or not dtypes <= set(TILE_DTYPES):
            wanted = " or ".join(map(str, TILE_DTYPES))
            yield f"x is {op.x.type}, up is {op.up.type} and down is {op.down.type}; tiles need one dtype, {wanted}"
        if op.y_type.shape != op.x.tensor.shape:
            yield f"x is {op.x.type} and the result {op.y_type}; tiles need as many columns"
        if 0 in (*op.up.tensor.shape, *op.down.tensor.shape):
            yield f"up is {op.up.type} and down is {op.down.type}: there is nothing to pack"
        for name, value in given.items():
            if value is None:
                continue
            if not self.deriver.is_fixed(value):
                yield f"{name} (%{value.name}) is no weight that stays as it is"
            for user in value.users:
                if not isinstance(user, Experts | Layer | Pack | PackBias | Scales):
                    yield f"'{user.name}' reads {name} (%{value.name}) too, so packing would store it twice"

    def pack(self, op: Experts | Layer) -> None:
        """Put an op that reads packed banks in the place of one that reads plain ones."""
        interleaved = op.layout == "interleaved"
        up = self._bank(op, op.up, op.parts, op.up_transposed, interleaved)
        down = self._bank(op, op.down, 1, op.down_transposed, False)
        biases = (self._bias(op, op.up_bias, op.parts, interleaved), self._bias(op, op.down_bias, 1, False))
        first = list(op.fields().operands).index("up")
        rest = list(op.arguments[first + 6 :])
        arguments = [*op.arguments[:first], up[0], down[0], *biases, up[1], down[1], *rest]
        while arguments[-1] is None:
            arguments.pop()
        dropped = ("up_transposed", "down_transposed", *(["layout"] if interleaved else []))
        attrs = {name: value for name, value in op.attrs.items() if name not in dropped}
        attrs |= {"packing": self.packing} | ({"activations": "int8"} if self.activations == "int8" else {})
        regions = [clone_block(region, {}) for region in op.regions]
        new = type(op)(arguments, None, attrs, regions, op.loc)
        assert op.block is not None
        op.block.insert_before(op, new)
        for old, result in zip(op.results, new.results, strict=True):
            result.name = old.name
            old.replace_by(result)
        op.erase()

    def _bank(self, op: Op, bank: Value, parts: int, transposed: bool, interleaved: bool) -> tuple[Value, Value | None]:
        """A packed bank and its scales."""
        attrs: dict[str, Attr] = {"packing": self.packing, "parts": parts}
        attrs |= {"transposed": transposed, "interleaved": interleaved}
        scales = None
        if self.packing != "tiles":
            scales = self._made(Scales, op, [bank], attrs, ".scales", bank)
        return self._made(Pack, op, [bank, scales], attrs, f".{self.packing}", bank), scales

    def _bias(self, op: Op, bias: Value | None, parts: int, interleaved: bool) -> Value | None:
        if bias is None:
            return None
        return self._made(PackBias, op, [bias], {"parts": parts, "interleaved": interleaved}, ".packed", bias)

    def _made(
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
