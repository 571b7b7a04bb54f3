"""Loads GPU code and launches it through the vendor's driver library: no compiler, no Triton, nothing is built.

CUDA's and HIP's driver interfaces have kept their binary form for many years; both are called by `ctypes`.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from sparsec.runtime.errors import ArtifactError

Grid: TypeAlias = tuple[int, int]

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, and HIP's attribute of the same number
_PLAIN_SHARED = 48 * 1024  # what a program may use without asking


class Program(Protocol):
    """An entry point on its device."""

    def __call__(self, grid: Grid, args: Sequence[Tensor | int]) -> None:
        """Launch on the current stream of the device; an int is passed with 32 bits."""
        ...


class Driver(ABC):
    """One vendor's driver library. `device` arguments are torch devices with an index."""

    prefix: str
    names: tuple[str, ...]

    def __init__(self) -> None:
        for name in self.names:
            try:
                self.library: Any = ctypes.CDLL(name)
                break
            except OSError:
                continue
        else:
            raise ArtifactError(f"no GPU driver: none of {', '.join(self.names)} can be loaded")

    @abstractmethod
    def activate(self, device: torch.device) -> None:
        """Make the context that torch uses on `device` this thread's own."""

    @abstractmethod
    def message(self, code: int) -> str:
        """What the driver says of an error."""

    def call(self, function: str, *args: Any) -> None:
        """Raises: ArtifactError with the driver's own words."""
        code = getattr(self.library, self.prefix + function)(*args)
        if code:
            raise ArtifactError(f"{self.prefix}{function} failed: {self.message(code)}")

    def load(self, image: bytes, symbol: str, threads: int, shared: int, device: torch.device) -> Program:
        """Load an entry point. Raises: ArtifactError if the driver refuses the image."""
        with torch.cuda.device(device):
            torch.cuda.current_stream(device)  # torch has made its context by now
            self.activate(device)
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self.call("ModuleLoadData", ctypes.byref(module), image)
            self.call("ModuleGetFunction", ctypes.byref(function), module, symbol.encode())
            if shared > _PLAIN_SHARED:
                self.call("FuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)

        def launch(grid: Grid, args: Sequence[Tensor | int]) -> None:
            values = [ctypes.c_int32(arg) if isinstance(arg, int) else ctypes.c_void_p(arg.data_ptr()) for arg in args]
            # Triton's programs end their parameters with two scratch pointers; ours were compiled to need neither.
            values += [ctypes.c_void_p(), ctypes.c_void_p()]
            pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            with torch.cuda.device(device):
                stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
                self.activate(device)
                self.launch(function, grid, threads, shared, stream, pointers)

        return launch

    @abstractmethod
    def launch(self, function: Any, grid: Grid, threads: int, shared: int, stream: Any, pointers: Any) -> None:
        """Put one launch on a stream; `shared` is in bytes."""


class Cuda(Driver):
    """NVIDIA's."""

    prefix = "cu"
    names = ("libcuda.so.1", "nvcuda.dll")

    def __init__(self) -> None:
        super().__init__()
        self.call("Init", 0)
        self.contexts: dict[int, ctypes.c_void_p] = {}

    def activate(self, device: torch.device) -> None:
        index = device.index or 0
        if index not in self.contexts:
            handle, context = ctypes.c_int(), ctypes.c_void_p()
            self.call("DeviceGet", ctypes.byref(handle), index)
            self.call("DevicePrimaryCtxRetain", ctypes.byref(context), handle)
            self.contexts[index] = context
        self.call("CtxSetCurrent", self.contexts[index])

    def message(self, code: int) -> str:
        text = ctypes.c_char_p()
        self.library.cuGetErrorString(code, ctypes.byref(text))
        return (text.value or b"error %d" % code).decode()

    def launch(self, function: Any, grid: Grid, threads: int, shared: int, stream: Any, pointers: Any) -> None:
        self.call("LaunchKernel", function, *grid, 1, threads, 1, 1, shared, stream, pointers, None)


class Hip(Driver):
    """AMD's."""

    prefix = "hip"
    names = (
        str(Path(torch.__file__).with_name("lib") / "libamdhip64.so"),
        "libamdhip64.so",
        "libamdhip64.so.7",
        "libamdhip64.so.6",
    )

    def activate(self, device: torch.device) -> None:
        self.call("SetDevice", device.index or 0)

    def message(self, code: int) -> str:
        self.library.hipGetErrorString.restype = ctypes.c_char_p
        return (self.library.hipGetErrorString(code) or b"error %d" % code).decode()

    def launch(self, function: Any, grid: Grid, threads: int, shared: int, stream: Any, pointers: Any) -> None:
        self.call("ModuleLaunchKernel", function, *grid, 1, threads, 1, 1, shared, stream, pointers, None)


@cache
def driver() -> Driver:
    """The driver of the GPUs that torch sees. Raises: ArtifactError if there is none."""
    if not torch.cuda.is_available():
        raise ArtifactError("this artifact needs a GPU, and torch sees none here")
    return Hip() if torch.version.hip else Cuda()


def architecture(device: torch.device) -> str:
    """The target that code must be compiled for to run on `device`: `cuda:sm_90`, `hip:gfx942`."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return "hip:" + str(properties.gcnArchName).partition(":")[0]
    return f"cuda:sm_{properties.major}{properties.minor}"
