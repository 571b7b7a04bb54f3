"""Rows that are rounded to fp8 (`activations = "fp8"`): the launch that does it, in front of the GEMM that reads them.

It leaves bytes of e4m3 with a scale for each group of 128 columns, for products of fp8; or rows as the model has them,
which hold every value that they are rounded to: so every family that reads packed weights computes the same, and the
one that multiplies bytes is faster where there is an instruction for it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from sparsec.codegen.triton.gemm import GroupedGemm
from sparsec.codegen.triton.launch import TOKENS, Argument, Entry, Parameter, Wiring, ceil_div
from sparsec.codegen.triton.source import indent
from sparsec.codegen.triton.tile import NARROW, POINTERS, padded
from sparsec.dialects.moe import GatherGemm
from sparsec.dialects.moe.references import GROUP
from sparsec.ir.core import Func
from sparsec.ir.types import DType

TAKEN = 4, 8
"""Rows and groups that a program rounds."""

BEYOND: Mapping[DType, float] = {DType.bf16: 31 / 32 * 2.0**128, DType.f32: 31 / 32 * 2.0**128, DType.f16: 63488.0}
"""The least value that e4m3, scaled, rounds to more than a dtype holds."""


class Rounding:
    """The launch for the rows of a GEMM, x or h. This class leaves them in their own element type.

    Attributes:
        given: what it writes, by the names that its text has.
    """

    ending: ClassVar[str] = "round"

    def __init__(self, func: Func, gemm: GroupedGemm, wiring: Wiring) -> None:
        self.gemm, self.dtype, self.name = gemm, gemm.a.tensor.dtype, f"{func.name}_{self.ending}"
        up = isinstance(gemm.op, GatherGemm)
        self.inner, self.times = ("H", "") if up else ("I", " * K")
        self.count = "t" if up or gemm.k == 1 else f"t * {gemm.k}"
        self.groups = -(-gemm.inner // GROUP)
        self.rows = gemm.pointer("a", gemm.a, wiring)
        self.given = self.written(wiring)

    def written(self, wiring: Wiring) -> tuple[Parameter, ...]:
        size = self.gemm.inner * self.dtype.itemsize
        return (Parameter("rounded", POINTERS[self.dtype], wiring.buffer(f"{self.count} * {size}")),)

    def stores(self) -> list[str]:
        """Write `q` [rows, groups, 128] and `scale` [rows, groups]."""
        value = "from_fp8(q, tl.float32, False) * scale[:, :, None]"
        dtype = NARROW.get(self.dtype, "tl.float32")
        return [f"tl.store(rounded + row * {self.inner} + columns, cut({value}, {dtype}), mask=there)"]

    def text(self) -> str:
        """The function."""
        (limit,) = struct.unpack("<i", struct.pack("<f", BEYOND[self.dtype]))
        whole = self.gemm.inner % (GROUP * self._taken) == 0
        within = "" if whole else f" & (columns < {self.inner})"
        lines = [
            f'"""Rows of a in e4m3, each group of {GROUP} columns over a power of two: {self.says}."""',
            "arrive(PDL)",
            "row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None, None]",
            "group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]",
            f"columns = group * {GROUP} + tl.arange(0, {GROUP})[None, None, :]",
            f"live = row < tokens{self.times}",
            f"there = live{within}",
            "row = row.to(tl.int64)",
            f"a = tl.load(a + row * {self.inner} + columns, mask=there, other=0).to(tl.float32)",
            f"q, scale = to_fp8(a, {limit:#x})",
            *self.stores(),
        ]
        names = [*(parameter.name for parameter in (self.rows, *self.given)), "tokens"]
        constants = [f"{name}: tl.constexpr" for name in ("ROWS", "GROUPS", "PDL")]
        head = f"def {self.name}({', '.join([*names, *constants])}):"
        return f'@triton.jit(do_not_specialize=["tokens"])\n{head}\n{indent(lines)}'

    @property
    def says(self) -> str:
        return "the values that they stand for"

    def entry(self) -> Entry:
        """The launch."""
        grid = ceil_div(self.count, TAKEN[0]), str(-(-self.groups // self._taken))
        constants = {"ROWS": TAKEN[0], "GROUPS": self._taken, "PDL": 0}
        return Entry(self.name, (self.rows, *self.given, TOKENS), constants, grid, 4, 1)

    @property
    def _taken(self) -> int:
        return min(TAKEN[1], padded(self.groups))

    def instead(self, parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
        """The parameters of a kernel that reads what this wrote in the place of the rows."""
        found = list[Parameter]()
        for parameter in parameters:
            if parameter.argument == self.rows.argument:
                found += self.read(parameter.name)
            elif parameter.argument.get("map") == self.rows.argument:
                argument: Argument = {**parameter.argument, "map": self.given[0].argument}
                found.append(replace(parameter, argument=argument))
            else:
                found.append(parameter)
        return tuple(found)

    def read(self, name: str) -> list[Parameter]:
        """The parameters in the place of the rows, which a kernel calls `name`."""
        return [replace(self.given[0], name=name)]


class Bytes(Rounding):
    """Leaves `q` [rows, groups * 128], bytes of e4m3, zeros beyond the columns, and `scales` f32 [rows, groups]."""

    ending = "narrow"

    def written(self, wiring: Wiring) -> tuple[Parameter, ...]:
        q, scales = (wiring.buffer(f"{self.count} * {self.groups * size}") for size in (GROUP, 4))
        return Parameter("bytes", "*u8", q), Parameter("scales", "*fp32", scales)

    def stores(self) -> list[str]:
        whole = self.groups % self._taken == 0
        mask = "live" if whole else f"live & (group < {self.groups})"
        return [
            f"tl.store(bytes + row * {self.groups * GROUP} + columns, q, mask={mask})",
            f"tl.store(scales + row * {self.groups} + group, scale[:, :, None], mask={mask})",
        ]

    @property
    def says(self) -> str:
        return "bytes and scales"

    def read(self, name: str) -> list[Parameter]:
        q, scales = self.given
        return [replace(q, name=name), replace(scales, name=f"{name}_scale")]


class Family(Protocol):
    def functions(self) -> list[str]: ...

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]: ...


class Behind:
    """A family whose kernels read what a rounding left."""

    def __init__(self, rounding: Rounding, family: Family) -> None:
        self.rounding, self.family = rounding, family

    def functions(self) -> list[str]:
        return [self.rounding.text(), *self.family.functions()]

    def launches(self, variant: Mapping[str, Any]) -> tuple[Entry, ...]:
        after = self.family.launches(variant)
        read = (replace(entry, parameters=self.rounding.instead(entry.parameters)) for entry in after)
        return self.rounding.entry(), *read
