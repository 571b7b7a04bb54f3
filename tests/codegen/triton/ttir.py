"""What one program of a kernel loads, stores and multiplies, counted in Triton's own IR.

The text is read line by line: constants, the arguments that pointers come from, loops with known bounds, and the ops
that move or multiply tiles. A loop whose trips are not known (over a program's tiles) counts once where products are
made in it, and not at all elsewhere. Blocks that return early are left out: the program is one that has a tile.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from math import prod

_BITS = {"bf16": 16, "f16": 16, "f32": 32, "i32": 32, "i64": 64, "i8": 8, "i16": 16, "i1": 8, "f8E4M3FN": 8}
_NAME = r"%[\w$.-]+"


@dataclass
class Account:
    """Of one program: bytes by the argument they come from or go to, padding and masked lanes included; flops."""

    loads: Counter[str] = field(default_factory=Counter[str])
    stores: Counter[str] = field(default_factory=Counter[str])
    flops: int = 0
    engine: set[str] = field(default_factory=set[str])  #: arguments whose blocks come by the copy engine

    def add(self, other: Account, times: int) -> None:
        for name, size in other.loads.items():
            self.loads[name] += size * times
        for name, size in other.stores.items():
            self.stores[name] += size * times
        self.flops += other.flops * times
        self.engine |= other.engine


def account(text: str) -> Account:
    """Count the one function of a module."""
    body = re.search(r"tt\.func public @\w+\((.*?)\) attributes.*?\{\n(.*?)\n  \}", text, re.S)
    assert body is not None
    arguments = re.findall(rf"({_NAME}): !tt\.(?:ptr|tensordesc)", body[1])
    counter = _Counter({name: name[1:] for name in arguments})
    lines = body[2].splitlines()
    counter.learn(lines)
    return counter.block(_main_path(lines))


def _main_path(lines: list[str]) -> list[str]:
    """The lines without blocks that return before the last one."""
    blocks: list[list[str]] = [[]]
    for line in lines:
        if re.match(r"  \^bb\d+", line):
            blocks.append([])
        blocks[-1].append(line)
    *early, last = blocks
    return [line for block in early if not block[-1].strip().startswith("tt.return") for line in block] + last


class _Counter:
    """Knows constants and what each pointer points into."""

    def __init__(self, roots: dict[str, str]) -> None:
        self.roots = roots
        self.constants: dict[str, int] = {}

    def learn(self, lines: list[str]) -> None:
        """Constants, and the argument behind each pointer."""
        for line in lines:
            if found := re.match(rf"\s*({_NAME}) = arith\.constant (-?\d+) : i\d+", line):
                self.constants[found[1]] = int(found[2])
            for name, start in re.findall(rf"({_NAME}) = ({_NAME})(?=[,)])", line) if "scf.for" in line else []:
                if start in self.roots:
                    self.roots[name] = self.roots[start]
            pointer = re.match(
                rf"\s*({_NAME}) = tt\.(?:addptr|bitcast|splat|broadcast|expand_dims|reshape) ({_NAME})", line
            )
            if pointer and pointer[2] in self.roots:
                self.roots[pointer[1]] = self.roots[pointer[2]]

    def block(self, lines: list[str]) -> Account:
        total, i = Account(), 0
        while i < len(lines):
            line = lines[i]
            if "scf.for" in line or "scf.if" in line:
                end = _end(lines, i)
                inner = self.block(lines[i + 1 : end])
                total.add(inner, self._trips(line, inner))
                i = end
            else:
                self._op(line, total)
            i += 1
        return total

    def _trips(self, line: str, inner: Account) -> int:
        bounds = re.search(rf"= ({_NAME}) to ({_NAME}) step ({_NAME})", line)
        if bounds is not None and all(name in self.constants for name in bounds.groups()):
            first, last, step = (self.constants[name] for name in bounds.groups())
            return -(-(last - first) // step)
        return 1 if inner.flops else 0

    def _op(self, line: str, total: Account) -> None:
        if load := re.search(rf"tt\.load ({_NAME}).* : (?:tensor<)?([\dx]*)!tt\.ptr<(\w+)>", line):
            total.loads[self.roots[load[1]]] += _bytes(load[2], load[3])
        elif load := re.search(rf"tt\.descriptor_load ({_NAME})\[.*-> tensor<([\dx]+)x(\w+)>", line):
            total.loads[self.roots[load[1]]] += _bytes(load[2], load[3])
            total.engine.add(self.roots[load[1]])
        elif store := re.search(rf"tt\.store ({_NAME}).* : (?:tensor<)?([\dx]*)!tt\.ptr<(\w+)>", line):
            total.stores[self.roots[store[1]]] += _bytes(store[2], store[3])
        elif dot := re.search(r"tt\.dot .* : tensor<(\d+)x(\d+)x\w+> \* tensor<\d+x(\d+)x\w+>", line):
            total.flops += 2 * prod(map(int, dot.groups()))
        elif (mul := re.search(r"arith\.mulf .* : tensor<(\d+x\d+x\d+)xf32>", line)) is not None:
            total.flops += 2 * prod(map(int, mul[1].split("x")))  # with the addition that takes it in


def _end(lines: list[str], start: int) -> int:
    """The line that closes the region that `start` opens."""
    indent = len(lines[start]) - len(lines[start].lstrip())
    for i in range(start + 1, len(lines)):
        if lines[i].startswith(" " * indent + "}") and not lines[i].rstrip().endswith("{"):
            return i
    raise AssertionError("a region without an end")


def _bytes(shape: str, element: str) -> int:
    return prod(int(size) for size in shape.split("x") if size) * _BITS[element] // 8
