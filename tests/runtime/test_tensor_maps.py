"""Tensor maps of plans: what they may say of a tensor, and what a driver is told; no GPU takes part."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from sparsec.runtime import tensor_maps
from sparsec.runtime.dims import compile_dim
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.gpu_driver import Cuda, Hip
from sparsec.runtime.tensor_maps import MapForm, TensorMap

MAP: dict[str, Any] = {
    "element": "bf16",
    "shape": ["2 * t", 64],
    "strides": [64, 1],
    "box": [128, 64],
    "swizzle": 3,
}


def form(**changes: Any) -> MapForm:
    return tensor_maps.parse("kernel 'k'", {**MAP, **changes}, compile_dim)


def made(tokens: int, tensor: torch.Tensor, **changes: Any) -> TensorMap:
    return form(**changes).of(tensor, {"t": tokens}, "kernel 'k'")


def rows(count: int, width: int = 64) -> torch.Tensor:
    return torch.zeros(count, width, dtype=torch.bfloat16)


def test_sizes_follow_the_token_count() -> None:
    map = made(5, rows(10))
    assert (map.shape, map.strides, map.box, map.swizzle, map.itemsize) == ((10, 64), (64, 1), (128, 64), 3, 2)


def test_a_map_may_show_part_of_a_tensor_and_bytes_as_elements() -> None:
    assert made(2, rows(5)).shape == (4, 64)
    scratch = torch.zeros(4 * 64 * 2, dtype=torch.uint8)
    assert made(2, scratch).shape == (4, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"element": "f64"}, "is of 'f64', can be of"),
        ({"element": ["bf16"]}, "can be of"),
        ({"shape": None}, "no shape, strides or box"),
        ({"shape": [64]}, "not one rank"),
        ({"shape": [1] * 6, "strides": [1] * 6, "box": [1] * 6}, "not one rank of at most 5"),
        ({"shape": [], "strides": [], "box": []}, "not one rank"),
        ({"shape": ["2 * t", "open('x')"]}, "not a dimension expression"),
        ({"strides": [64, 1.5]}, "neither an integer nor an expression"),
        ({"box": [512, 64]}, "not of sizes up to 256"),
        ({"box": [0, 64]}, "not of sizes up to 256"),
        ({"box": [True, 64]}, "not of sizes up to 256"),
        ({"box": ["t", 64]}, "not of sizes up to 256"),
        ({"box": [128, 128]}, "does not go with rows of 256 bytes"),
        ({"box": [128, 60]}, "does not go with rows of 120 bytes"),
        ({"swizzle": 4}, "the swizzle 4"),
        ({"swizzle": None}, "the swizzle None"),
    ],
)
def test_damaged_maps_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        form(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": ["2 * t + 1", 64]}, "leads out of the tensor"),
        ({"shape": ["2 * t", 65]}, "leads out of the tensor"),
        ({"strides": [72, 1]}, "leads out of the tensor"),
        ({"element": "f32", "box": [128, 32]}, "leads out of the tensor"),
        ({"strides": [-64, 1]}, "no strides"),
        ({"strides": [0, 1]}, "no strides"),
        ({"strides": [60, 1]}, "no strides"),
        ({"strides": [2**40, 1]}, "no strides"),
        ({"strides": [64, 2]}, "no strides"),
    ],
)
def test_maps_that_lead_out_of_a_tensor_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        made(5, rows(10), **change)


@pytest.mark.parametrize("shape", [["t - 5", 64], ["t - 6", 64], ["t * 1000000000", 64]])
def test_empty_and_endless_tensors_are_refused(shape: list[Any]) -> None:
    with pytest.raises(InputError, match="no tensor of the sizes"):
        made(5, rows(10), shape=shape)


def test_an_absent_operand_has_no_map() -> None:
    with pytest.raises(InputError, match="no tensor to map"):
        form().of(None, {"t": 1}, "kernel 'k'")


class Library:
    """Stands for libcuda: remembers what it is told, in Python's own numbers."""

    def __init__(self) -> None:
        self.maps: list[Any] = []
        self.launches: list[Any] = []

    def cuTensorMapEncodeTiled(
        self, out: Any, element: int, rank: int, address: Any, sizes: Any, steps: Any, box: Any, ones: Any,
        interleave: int, swizzle: int, promotion: int, fill: int,
    ) -> int:  # fmt: skip
        where = ctypes.addressof(out._obj)
        out._obj[0] = 77
        self.maps.append((where, element, rank, address.value, *map(list, (sizes, steps, box, ones)), interleave,
                          swizzle, promotion, fill))  # fmt: skip
        return 0

    def cuLaunchKernelEx(self, config: Any, function: Any, params: Any, extra: None) -> int:
        self.launches.append((config._obj, function, params))
        return 0


def driver() -> tuple[Cuda, Library]:
    class Fake(Cuda):
        names = (None,)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]  # this process itself

        def call(self, function: str, *args: Any) -> None:
            if isinstance(self.library, Library):
                super().call(function, *args)

    made, library = Fake(), Library()
    made.library = library
    return made, library


def test_what_the_driver_is_told_of_a_map() -> None:
    cuda, library = driver()
    bank = torch.zeros(8, 32, 64, dtype=torch.float16)
    map = TensorMap(bank, "f16", (8, 32, 64), (2048, 64, 1), (1, 16, 64), 3)
    descriptor, *rest = cuda.values(map)
    ((where, *told),) = library.maps
    assert where % 64 == 0 and ctypes.sizeof(descriptor) == 128
    assert told == [6, 3, bank.data_ptr(), [64, 32, 8], [128, 4096], [64, 16, 1], [1, 1, 1], 0, 3, 2, 0]
    kinds = [type(value) for value in rest]
    assert kinds == [ctypes.c_int32] * 3 + [ctypes.c_int64] * 3
    assert [value.value for value in rest] == [8, 32, 64, 2048, 64, 1]


def test_equal_maps_are_made_once() -> None:
    cuda, library = driver()
    bank = torch.zeros(8, 64, dtype=torch.bfloat16)
    maps = [TensorMap(tensor, "bf16", (8, 64), (64, 1), (8, 64), 3) for tensor in (bank, bank, bank[4:])]
    first, second, third = [cuda.values(map)[0] for map in maps]
    assert first is second and third is not first
    assert len(library.maps) == 2


def test_an_early_launch_says_so() -> None:
    cuda, library = driver()
    parameters = (ctypes.c_void_p * 1)()
    cuda.launch(ctypes.c_void_p(9), (3, 2), 384, 1000, ctypes.c_void_p(5), parameters, early=True)
    ((config, function, given),) = library.launches
    assert (list(config.grid), list(config.block), config.shared, config.stream) == ([3, 2, 1], [384, 1, 1], 1000, 5)
    assert config.count == 1
    attribute = config.attributes[0]
    assert attribute.id == 6 and attribute.value[0] == 1  # programmatic stream serialization
    assert ctypes.sizeof(attribute) == 72 and ctypes.sizeof(config) == 56
    assert function.value == 9 and given is parameters


def test_shared_memory_is_asked_for_on_nvidia_only() -> None:
    cuda, library = driver()
    asked = list[tuple[str, Any]]()
    for name in ("cuFuncSetAttribute", "cuFuncSetCacheConfig"):
        setattr(library, name, lambda *given, name=name: asked.append((name, given)))
    cuda.allow(9, 48 << 10)
    assert asked == []
    cuda.allow(9, 100 << 10)
    assert asked == [("cuFuncSetAttribute", (9, 8, 102400)), ("cuFuncSetCacheConfig", (9, 1))]
    Hip.__new__(Hip).allow(9, 60 << 10)  # which would fail: no library is open


def test_other_vendors_have_no_maps() -> None:
    with pytest.raises(ArtifactError, match="GPUs of this vendor do not have"):
        Hip.values(Hip.__new__(Hip), TensorMap(rows(8), "bf16", (8, 64), (64, 1), (8, 64), 3))
