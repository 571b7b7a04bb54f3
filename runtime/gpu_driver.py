"""Loads GPU code and launches it through the vendor's driver library: no compiler, no Triton, nothing is built.

CUDA's and HIP's driver interfaces have kept their binary form for many years; both are called by `ctypes`.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.tensor_maps import ELEMENTS, TensorMap

Grid: TypeAlias = tuple[int, int]


class Program(Protocol):
    """An entry point on its device."""

    def __call__(self, grid: Grid, args: Sequence[Tensor | int | TensorMap]) -> None:
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

    def load(
        self, image: bytes, symbol: str, threads: int, shared: int, device: torch.device, *, early: bool = False
    ) -> Program:
        """Load an entry point. Raises: ArtifactError if the driver refuses the image.

        Args:
            early: launch it before the launch in front of it has ended; it waits by itself.
        """
        with torch.cuda.device(device):
            torch.cuda.current_stream(device)  # torch has made its context by now
            self.activate(device)
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            self.call("ModuleLoadData", ctypes.byref(module), image)
            self.call("ModuleGetFunction", ctypes.byref(function), module, symbol.encode())
            self.allow(function, shared)

        def launch(grid: Grid, args: Sequence[Tensor | int | TensorMap]) -> None:
            with torch.cuda.device(device):
                stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
                self.activate(device)  # before maps are made: the driver makes none in a thread without a context
                values = [value for arg in args for value in self.values(arg)]
                # Triton's programs end their parameters with two scratch pointers; ours were compiled to need neither.
                values += [ctypes.c_void_p(), ctypes.c_void_p()]
                pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
                self.launch(function, grid, threads, shared, stream, pointers, early)

        return launch

    @abstractmethod
    def allow(self, function: Any, shared: int) -> None:
        """Let a program have as many bytes of dynamic shared memory."""

    def values(self, arg: Tensor | int | TensorMap) -> list[Any]:
        """One argument as the parameters that Triton makes of it."""
        if isinstance(arg, int):
            return [ctypes.c_int32(arg)]
        if isinstance(arg, Tensor):
            return [ctypes.c_void_p(arg.data_ptr())]
        sizes, strides = map(ctypes.c_int32, arg.shape), map(ctypes.c_int64, arg.strides)
        return [self.encode(arg), *sizes, *strides]

    def encode(self, map: TensorMap) -> Any:
        """A tensor map in the hardware's own form. Raises: ArtifactError."""
        raise ArtifactError("this kernel takes tensor maps, which GPUs of this vendor do not have")

    @abstractmethod
    def launch(
        self, function: Any, grid: Grid, threads: int, shared: int, stream: Any, pointers: Any, early: bool
    ) -> None:
        """Put one launch on a stream; `shared` is in bytes."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a number and a union of 64 bytes, of which we use an int."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_EARLY = _Attribute(6, 0, (1,))  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAP_SIZE, _MAP_ALIGNMENT = 128, 128  # of a CUtensorMap, in bytes; up to CUDA 12 an alignment of 64 was enough
_L2_PROMOTION = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PREFER_SHARED = 1  # CU_FUNC_CACHE_PREFER_SHARED
_PLAIN_SHARED = 48 * 1024  # what a program may use without asking


class Cuda(Driver):
    """NVIDIA's."""

    prefix = "cu"
    names = ("libcuda.so.1", "nvcuda.dll")

    def __init__(self) -> None:
        super().__init__()
        self.call("Init", 0)
        self.contexts: dict[int, ctypes.c_void_p] = {}
        # A map says where and how, not what: equal numbers make equal maps, whoever owns the memory.
        self.encoded = lru_cache(4096)(self._encode)

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

    def allow(self, function: Any, shared: int) -> None:
        if shared > _PLAIN_SHARED:
            self.call("FuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared)
            self.call("FuncSetCacheConfig", function, _PREFER_SHARED)  # so that several programs fit side by side

    def launch(
        self, function: Any, grid: Grid, threads: int, shared: int, stream: Any, pointers: Any, early: bool
    ) -> None:
        if not early:
            self.call("LaunchKernel", function, *grid, 1, threads, 1, 1, shared, stream, pointers, None)
            return
        config = _Config((*grid, 1), (threads, 1, 1), shared, stream, ctypes.pointer(_EARLY), 1)
        self.call("LaunchKernelEx", ctypes.byref(config), function, pointers, None)

    def encode(self, map: TensorMap) -> Any:
        return self.encoded(
            map.tensor.data_ptr(), map.element, map.itemsize, map.shape, map.strides, map.box, map.swizzle
        )

    def _encode(self, address: int, element: str, itemsize: int, shape: tuple[int, ...], strides: tuple[int, ...],
                box: tuple[int, ...], swizzle: int) -> Any:  # fmt: skip
        rank = len(shape)
        memory = (ctypes.c_uint8 * (_MAP_SIZE + _MAP_ALIGNMENT))()
        made = (ctypes.c_uint8 * _MAP_SIZE).from_buffer(memory, -ctypes.addressof(memory) % _MAP_ALIGNMENT)
        sizes = (ctypes.c_uint64 * rank)(*reversed(shape))  # the driver counts from the innermost
        steps = (ctypes.c_uint64 * (rank - 1))(*(stride * itemsize for stride in reversed(strides[:-1])))
        sides, ones = (ctypes.c_uint32 * rank)(*reversed(box)), (ctypes.c_uint32 * rank)(*[1] * rank)
        self.call("TensorMapEncodeTiled", ctypes.byref(made), ELEMENTS[element], rank, ctypes.c_void_p(address), sizes,
                  steps, sides, ones, 0, swizzle, _L2_PROMOTION, 0)  # fmt: skip
        return made


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

    def allow(self, function: Any, shared: int) -> None:
        """It need not be asked for: hipFuncSetAttribute knows the host's functions only."""

    def message(self, code: int) -> str:
        self.library.hipGetErrorString.restype = ctypes.c_char_p
        return (self.library.hipGetErrorString(code) or b"error %d" % code).decode()

    def launch(
        self, function: Any, grid: Grid, threads: int, shared: int, stream: Any, pointers: Any, early: bool
    ) -> None:
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
