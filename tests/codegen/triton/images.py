"""Reads what compiled GPU code says of itself: its parameters, threads and shared memory, as the drivers read it."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

PARAMETER, THREADS, CLUSTER = (
    (0x17, 0x45),
    0x10,
    0x3D,
)  # EIATTR_KPARAM_INFO and its second form, REQNTID, CTA_PER_CLUSTER
VALUE = 4  # EIFMT_SVAL: as many bytes as the entry says
RESERVED = 0x400  #: bytes of shared memory that the system keeps for itself in each program, from sm_90 on


@dataclass(frozen=True)
class Image:
    """One entry point.

    Args:
        parameters: (offset, bytes) of each, in order.
        threads: of a program.
        shared: static shared memory, in bytes.
    """

    parameters: tuple[tuple[int, int], ...]
    threads: int
    shared: int

    @property
    def sizes(self) -> list[int]:
        return [size for _, size in self.parameters]


def cubin(image: bytes, symbol: str) -> Image:
    """Of NVIDIA's: an ELF file whose section `.nv.info.SYMBOL` describes the entry point."""
    sections = {name: (at, size) for name, at, size in _sections(image)}
    start, length = sections[f".nv.info.{symbol}"]
    parameters, threads = dict[int, tuple[int, int]](), 0
    for kind, payload in _attributes(image[start : start + length]):
        if kind in PARAMETER:
            ordinal, offset, packed = struct.unpack_from("<4xHHI", payload)
            parameters[ordinal] = offset, packed >> 18
        elif kind == THREADS:
            x, y, z = struct.unpack("<III", payload)
            threads = x * y * z
        else:
            assert kind != CLUSTER, f"{symbol} is for a cluster of programs"
    _, shared = sections.get(f".nv.shared.{symbol}", (0, 0))
    return Image(tuple(parameters[i] for i in range(len(parameters))), threads, shared % RESERVED)


def hsaco(assembly: str) -> Image:
    """Of AMD's, from the metadata at the end of its assembly."""
    found = assembly[assembly.index(".amdgpu_metadata") :]
    given = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", found)
    parameters = tuple((int(offset), int(size)) for offset, size, kind in given if not kind.startswith("hidden"))
    threads, shared = (
        re.search(rf"\.{name}:\s+(\d+)", found) for name in ("max_flat_workgroup_size", "group_segment_fixed_size")
    )
    assert threads is not None and shared is not None
    return Image(parameters, int(threads[1]), int(shared[1]))


def _sections(image: bytes) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size of each section of a 64-bit little-endian ELF file."""
    assert image[:6] == b"\x7fELF\x02\x01"
    (at,) = struct.unpack_from("<Q", image, 0x28)
    size, count, names = struct.unpack_from("<HHH", image, 0x3A)
    entries = [struct.unpack_from("<IIQQQQ", image, at + i * size) for i in range(count)]
    start = entries[names][4]
    for name, _, _, _, offset, length in entries:
        yield image[start + name : image.index(b"\0", start + name)].decode(), offset, length


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    """Those of a section `.nv.info`: a format, a kind, and two bytes that are the value or its length."""
    at = 0
    while at < len(info):
        form, kind, length = struct.unpack_from("<BBH", info, at)
        at += 4
        payload = info[at : at + length] if form == VALUE else b""
        yield kind, payload
        at += len(payload)
