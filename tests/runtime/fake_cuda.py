"""NVIDIA's driver library, without a GPU: its functions with the types of cuda.h, which check and remember.

They are called as `ctypes` calls a library: what crosses is C. What the driver documents as an error is one here, and
what it would leave to the GPU to trip over, as far as it can be seen, is one too.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import nullcontext
from ctypes import POINTER, c_char_p, c_int, c_uint, c_uint64, c_void_p
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparsec.runtime import gpu_driver
from tests.codegen.triton.images import Image, cubin

INVALID, NO_IMAGE, NO_CONTEXT, NOT_FOUND = 1, 200, 201, 500
OPTED_IN, PLAIN = 227 * 1024, 48 * 1024  #: bytes of shared memory that a program of an H100 may ask for, and has
MULTIPROCESSORS = 132
STREAM = 0x7F00_0000_0010
ITEMS = {0: 1, 6: 2, 7: 4, 9: 2}  #: bytes of an element by CUtensorMapDataType


class Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_char * 64))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("gridDimX", c_uint), ("gridDimY", c_uint), ("gridDimZ", c_uint),
        ("blockDimX", c_uint), ("blockDimY", c_uint), ("blockDimZ", c_uint),
        ("sharedMemBytes", c_uint), ("hStream", c_void_p), ("attrs", c_void_p), ("numAttrs", c_uint),
    )  # fmt: skip


@dataclass(frozen=True)
class Map:
    """A tensor map as it was asked for, innermost size first."""

    address: int
    element: int
    sizes: tuple[int, ...]
    steps: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


@dataclass(frozen=True)
class Launched:
    """A launch: `values` are the bytes of each parameter, as many as the image says."""

    symbol: str
    grid: tuple[int, int, int]
    shared: int
    stream: int | None
    early: bool
    values: tuple[bytes, ...]


@dataclass
class Function:
    """An entry point of a loaded image; `allowed` is the shared memory that was asked for."""

    symbol: str
    image: Image
    allowed: int = PLAIN


@dataclass
class Library:
    """Stands for libcuda.so.1.

    Attributes:
        launches, maps: what was asked for, in order.
        why: reasons for what was refused.
    """

    launches: list[Launched] = field(default_factory=list[Launched])
    maps: list[Map] = field(default_factory=list[Map])
    why: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self._here = threading.local()
        self._images, self._functions = list[bytes](), list[Function]()
        out, name = POINTER(c_void_p), c_char_p
        self._export("cuInit", self._init, c_uint)
        self._export("cuDeviceGet", self._device, POINTER(c_int), c_int)
        self._export("cuDevicePrimaryCtxRetain", self._retain, out, c_int)
        self._export("cuCtxSetCurrent", self._current, c_void_p)
        self._export("cuModuleLoadData", self._load, out, c_void_p)
        self._export("cuModuleGetFunction", self._function, out, c_void_p, name)
        self._export("cuFuncSetAttribute", self._attribute, c_void_p, c_int, c_int)
        self._export("cuFuncSetCacheConfig", self._prefer, c_void_p, c_int)
        self._export("cuLaunchKernel", self._launch, c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), c_void_p)
        self._export("cuLaunchKernelEx", self._launch_ex, POINTER(Config), c_void_p, POINTER(c_void_p), c_void_p)
        self._export(
            "cuTensorMapEncodeTiled", self._encode, c_void_p, c_int, c_uint, c_void_p, POINTER(c_uint64),
            POINTER(c_uint64), POINTER(c_uint), POINTER(c_uint), c_int, c_int, c_int, c_int,
        )  # fmt: skip
        self._export("cuGetErrorString", self._message, c_int, POINTER(c_char_p))

    def _export(self, name: str, function: Callable[..., int], *types: Any) -> None:
        """As a symbol of a library that ctypes has opened: callable without declared arguments."""
        behind = ctypes.CFUNCTYPE(c_int, *types)(function)
        address = ctypes.cast(behind, c_void_p).value
        assert address is not None
        symbol: Any = ctypes.CFUNCTYPE(c_int)(address)
        symbol.behind = behind  # alive as long as the symbol is
        setattr(self, name, symbol)

    def _refuse(self, why: str, code: int = INVALID) -> int:
        self.why.append(why)
        return code

    def _init(self, flags: int) -> int:
        return self._refuse(f"flags {flags}") if flags else 0

    def _device(self, out: Any, index: int) -> int:
        out[0] = index
        return self._refuse(f"there is no device {index}", 101) if index else 0

    def _retain(self, out: Any, device: int) -> int:
        out[0] = 0xC0DE_0000_0000 + device
        return 0

    def _current(self, context: int | None) -> int:
        self._here.context = context
        return 0

    @property
    def _lost(self) -> int:
        """An error where this thread has no context."""
        found = getattr(self._here, "context", None) == 0xC0DE_0000_0000
        return 0 if found else self._refuse("this thread has no context", NO_CONTEXT)

    def _load(self, out: Any, image: int) -> int:
        if lost := self._lost:
            return lost
        if ctypes.string_at(image, 4) != b"\x7fELF":
            return self._refuse("this is no image", NO_IMAGE)
        head = ctypes.string_at(image, 64)
        ends = [int.from_bytes(head[at : at + 8], "little") for at in (0x20, 0x28)]  # of headers, which come last
        sizes = [int.from_bytes(head[at : at + 2], "little") for at in range(0x36, 0x3E, 2)]
        length = max(ends[0] + sizes[0] * sizes[1], ends[1] + sizes[2] * sizes[3])
        self._images.append(ctypes.string_at(image, length))
        out[0] = len(self._images)
        return 0

    def _function(self, out: Any, module: int, name: bytes) -> int:
        try:
            found = cubin(self._images[module - 1], name.decode())
        except KeyError:
            return self._refuse(f"there is no {name.decode()}", NOT_FOUND)
        self._functions.append(Function(name.decode(), found))
        out[0] = 0xF00_0000_0000 + len(self._functions)
        return 0

    def _of(self, handle: int) -> Function:
        return self._functions[handle - 0xF00_0000_0000 - 1]

    def _attribute(self, function: int, kind: int, value: int) -> int:
        if kind != 8 or not 0 <= value <= OPTED_IN - self._of(function).image.shared:
            return self._refuse(f"attribute {kind} = {value}")
        self._of(function).allowed = value
        return 0

    def _prefer(self, function: int, what: int) -> int:
        return self._refuse(f"preference {what}") if not self._of(function).symbol or what not in range(4) else 0

    def _launch(self, function: int, *rest: Any) -> int:
        *sizes, stream, given, extra = rest
        return self._run(function, sizes[:3], sizes[3:6], sizes[6], stream, given, extra, False)

    def _launch_ex(self, config: Any, function: int, given: Any, extra: int | None) -> int:
        asked: Config = config[0]
        early = False
        for i in range(asked.numAttrs):
            attribute = Attribute.from_address(asked.attrs + i * ctypes.sizeof(Attribute))
            if attribute.id != 6 or int.from_bytes(bytes(attribute.value)[:4].ljust(4, b"\0"), "little") != 1:
                return self._refuse(f"launch attribute {attribute.id} = {attribute.value!r}")
            early = True
        grid = asked.gridDimX, asked.gridDimY, asked.gridDimZ
        block = asked.blockDimX, asked.blockDimY, asked.blockDimZ
        return self._run(function, grid, block, asked.sharedMemBytes, asked.hStream, given, extra, early)

    def _run(
        self, handle: int, grid: Any, block: Any, shared: int, stream: int | None, given: Any, extra: Any, early: bool
    ) -> int:
        if lost := self._lost:
            return lost
        function = self._of(handle)
        x, y, z = grid
        if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
            return self._refuse(f"{function.symbol}: grid {tuple(grid)}")
        if tuple(block) != (function.image.threads, 1, 1):
            return self._refuse(f"{function.symbol}: block {tuple(block)}, compiled for {function.image.threads}")
        if shared > function.allowed or extra is not None:
            return self._refuse(f"{function.symbol}: {shared} bytes of shared memory, {function.allowed} allowed")
        values = tuple(ctypes.string_at(given[i], size) for i, size in enumerate(function.image.sizes))
        self.launches.append(Launched(function.symbol, (x, y, z), shared, stream, early, values))
        return 0

    def _encode(
        self, out: int, element: int, rank: int, address: int, sizes: Any, steps: Any, box: Any, strides: Any,
        interleave: int, swizzle: int, promotion: int, fill: int,
    ) -> int:  # fmt: skip
        if lost := self._lost:
            return lost
        item = ITEMS.get(element, 0)
        made = Map(address, element, tuple(sizes[:rank]), tuple(steps[: rank - 1]), tuple(box[:rank]), swizzle)
        wrong = [
            *(["its address"] if out % 128 or address % 16 else []),
            *(["its element"] if not item else []),
            *(["its rank"] if not 1 <= rank <= 5 else []),
            *(["its sizes"] if not all(0 < size <= 2**32 for size in made.sizes) else []),
            *(["its steps"] if not all(step % 16 == 0 and 0 < step < 2**40 for step in made.steps) else []),
            *(["its box"] if not all(0 < side <= 256 for side in made.box) or made.box[0] * item % 16 else []),
            *(["its strides"] if set(strides[:rank]) != {1} else []),
            *(["its swizzle"] if swizzle not in range(4) or (swizzle and made.box[0] * item > 16 << swizzle) else []),
            *(["its options"] if interleave or promotion not in range(4) or fill else []),
        ]
        if wrong:
            return self._refuse(f"{', '.join(wrong)} of {made}")
        self.maps.append(made)
        ctypes.memmove(out, len(self.maps).to_bytes(8, "little") + b"M" * 120, 128)
        return 0

    def map(self, value: bytes) -> Map:
        """The tensor map that a parameter is."""
        assert len(value) == 128 and value[8:] == b"M" * 120
        return self.maps[int.from_bytes(value[:8], "little") - 1]

    def _message(self, code: int, out: Any) -> int:
        self._said = f"error {code}: {self.why[-1] if self.why else ''}".encode()
        out[0] = self._said
        return 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """The driver of this process; torch's part of a GPU is stood in for, and its tensors are the processor's."""
    made, cuda = Library(), torch.cuda
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=MULTIPROCESSORS)
    with monkeypatch.context() as opened:
        opened.setattr(ctypes, "CDLL", lambda name: made)
        found = gpu_driver.Cuda()
    monkeypatch.setattr(gpu_driver, "driver", lambda: found)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=STREAM))
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: properties)
    return made
