"""The assembly that widens packed weights, run instruction by instruction for every value there is."""

from __future__ import annotations

import ast
import re
import struct

import pytest
import torch

from sparsec.codegen.triton.source import library
from sparsec.runtime.blocks import FP4


def assembly(function: str, wide: bool = False) -> str:
    """The text that a function of the library puts into kernels for bf16, or for f32 (`wide`)."""
    (node,) = ast.parse(library()[function]).body
    texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return [text for text in texts if "prmt" in text][wide]


def single(word: int) -> float:
    """An f32 as a number."""
    return struct.unpack("<f", struct.pack("<I", word))[0]


def halves(word: int) -> list[float]:
    """Two bf16 as numbers, the lower first."""
    return [struct.unpack("<f", struct.pack("<I", (word >> shift & 0xFFFF) << 16))[0] for shift in (0, 16)]


def bits(low: float, high: float) -> int:
    """Two numbers that bf16 holds as a word."""
    words = [struct.unpack("<I", struct.pack("<f", value))[0] for value in (low, high)]
    assert not any(word & 0xFFFF for word in words), "the product is no bf16"
    return words[0] >> 16 | words[1]


def run(text: str, registers: dict[str, int]) -> dict[str, int]:
    """Executes the few instructions that there are."""
    for line in re.findall(r"([a-z][\w.]+) ([^;]*);", text):
        name, operands = line[0], [operand.strip() for operand in line[1].split(",")]
        if name == ".reg" or name.startswith("reg"):
            continue
        out, *given = operands
        values = [registers[v] if v in registers else int(v, 0) for v in given]
        match name:
            case "mov.b32" | "cvt.u32.u16":
                made = values[0]
            case "and.b32":
                made = values[0] & values[1]
            case "shr.u32":
                made = values[0] >> values[1]
            case "shl.b32":
                made = values[0] << values[1] & 0xFFFFFFFF
            case "prmt.b32":
                assert values[2] & 0x8888 == 0
                both = values[0] | values[1] << 32
                made = sum((both >> 8 * (values[2] >> 4 * i & 7) & 255) << 8 * i for i in range(4))
            case "lop3.b32":
                made = 0
                for i in range(32):
                    bit = [value >> i & 1 for value in values[:3]]
                    made |= (values[3] >> (4 * bit[0] + 2 * bit[1] + bit[2]) & 1) << i
            case "fma.rn.bf16x2":
                made = bits(*(x * y + z for x, y, z in zip(*map(halves, values), strict=True)))
            case _:
                raise AssertionError(f"no such instruction here: {name}")
        registers[out] = made
    return registers


def test_fp8() -> None:
    text = assembly("from_fp8")
    finite = [byte for byte in range(256) if byte & 127 != 127]
    finite += [0] * (-len(finite) % 4)
    for at in range(0, len(finite), 4):
        word = int.from_bytes(bytes(finite[at : at + 4]), "little")
        got = run(text, {"$2": word})
        wanted = torch.tensor(finite[at : at + 4], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        assert halves(got["$0"]) + halves(got["$1"]) == wanted.tolist()
        got = run(assembly("from_fp8", wide=True), {"$4": word})
        assert [single(got[f"${i}"]) for i in range(4)] == wanted.tolist()


def test_fp8_by_twos() -> None:
    text = assembly("matrix_from_fp8")
    for first in range(0, 256, 2):
        if (first + 1) & 127 != 127:  # which is no number
            got = run(text, {"$1": first | (first + 1) << 8})
            wanted = torch.tensor([first, first + 1], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
            assert halves(got["$0"]) == wanted.tolist()


@pytest.mark.parametrize("scale", [0, 1, 121, 128])
@pytest.mark.parametrize(("function", "shift"), [("lower_halves", 0), ("upper_halves", 4)])
def test_mxfp4_by_twos(function: str, shift: int, scale: int) -> None:
    text, numbers = assembly(function), [*FP4, *(-value for value in FP4)]
    for first in range(0, 256, 2):
        got = run(text, {"$1": first | (first + 1) << 8, "$2": ((scale + 126) << 7) * 0x10001})
        codes = [byte >> shift & 15 for byte in (first, first + 1)]
        assert halves(got["$0"]) == [numbers[code] * 2.0 ** (scale - 127) for code in codes]


@pytest.mark.parametrize("scales", [(0, 128), (119, 121), (127, 1)])
def test_mxfp4(scales: tuple[int, int]) -> None:
    """Every byte; the lower half with the first scale, the upper half with the second."""
    text, numbers = assembly("from_mxfp4"), [*FP4, *(-value for value in FP4)]
    low, high = (((scale + 126) << 7) * 0x10001 for scale in scales)
    for first in range(0, 256, 4):
        word = int.from_bytes(bytes(range(first, first + 4)), "little")
        got = run(text, {"$4": word, "$5": low, "$6": low, "$7": high, "$8": high})
        for half, scale in ((0, scales[0]), (1, scales[1])):
            found = halves(got[f"${2 * half}"]) + halves(got[f"${2 * half + 1}"])
            codes = [byte >> 4 * half & 15 for byte in range(first, first + 4)]
            wanted = [numbers[code] * 2.0 ** (scale - 127) for code in codes]
            assert found == wanted
            # Of the registers with scales, one for each byte, those of the first byte are read, in bits 0 to 15.
            shifted = {"$9": low & 0xFFFF, "$13": high & 0xFFFF}
            wide = run(assembly("from_mxfp4", wide=True), {"$8": word, **shifted})
            assert [single(wide[f"${4 * half + i}"]) for i in range(4)] == wanted
