"""What a compiled kernel takes is what the runtime passes, parameter by parameter; no GPU takes part."""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sparsec.codegen.triton.emit import emit_kernel
from sparsec.ir.core import Func, Value
from sparsec.runtime.dims import compile_dim
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.gpu_driver import Cuda
from sparsec.runtime.plan import Kernel, Tensor
from sparsec.runtime.triton_kernels import launcher
from tests.codegen.triton import build
from tests.codegen.triton.interpret import type_of
from tests.codegen.triton.packed import packed

pytest.importorskip("triton")
SMALL: dict[str, Any] = {"block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}


def silu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(a) * b


def up(kernel: str, layout: str, dtype: torch.dtype) -> Func:
    return build.gather_gemm(silu, 64, 64, 4, 2, dtype, layout, variants=({**SMALL, "kernel": kernel},))


def down(kernel: str, **sizes: int) -> Func:
    variants = ({**SMALL, "kernel": kernel, **sizes},)
    return build.gemm_combine(64, 128, 4, 2, torch.bfloat16, True, variants=variants, listed=True)


class Encoder(Cuda):
    """A driver that makes empty maps and is never asked to launch."""

    def __init__(self) -> None:
        self.encoded = lambda *_: (ctypes.c_uint8 * 128)()  # type: ignore[assignment]


def passed(func: Func) -> Iterator[tuple[str, list[Any]]]:
    """Of each launch: its PTX, and the values that the runtime passes to the driver."""
    op, made = func.body.ops[0], emit_kernel(func, "cuda:sm_90")
    params = tuple(type_of(value.type) if isinstance(value, Value) else None for value in op.arguments)
    results = tuple(type_of(value.type) for value in op.results)
    kernel = Kernel(func.name, op.name, "triton", params, results, "t", {}, {}, list(made.variants))
    texts, given = list[str](), list[list[Any]]()

    def load(config: Any) -> Any:
        texts.append(made.binaries[config["file"]].assembly)
        return lambda grid, args: given.append(list(args))

    operands = [None if param is None else zeros(param) for param in params]
    launcher(kernel, torch.device("cpu"), load, sms=2)(operands)
    for text, args in zip(texts, given, strict=True):
        yield text, [value for arg in args for value in Encoder().values(arg)]


def zeros(type: Tensor) -> torch.Tensor:
    """A tensor of a plan's type, for 5 tokens."""
    sizes = [size if isinstance(size := compile_dim(dim), int) else size({"t": 5}) for dim in type.shape]
    return torch.zeros(sizes, dtype=DTYPES[type.dtype])


FUNCS: dict[str, Callable[[], Func]] = {
    "tma": lambda: up("tma", "concat", torch.bfloat16),
    "swap": lambda: up("swap", "interleaved", torch.float16),
    "swap fp8": lambda: packed(up("swap", "concat", torch.bfloat16), "fp8"),
    "swap mxfp4": lambda: packed(up("swap", "interleaved", torch.bfloat16), "mxfp4"),
    "tiles": lambda: down("tiles"),
    "persistent": lambda: down("persistent"),
    "divided": lambda: down("persistent", block_m=128),
    "deep": lambda: down("persistent", block_k=128, num_warps=8),
}


@pytest.mark.parametrize("name", FUNCS)
def test_parameters(name: str) -> None:
    launches = list(passed(FUNCS[name]()))
    assert launches
    for text, values in launches:
        head = text[text.index(".visible .entry") :]
        head = head[: head.index("{")]
        found = re.findall(r"\.param \.(align 64 \.b8|u32|u64)\b.*?(\[128\])?,?\n", head)
        assert len(found) == head.count(".param")
        sizes = [{"u32": 4, "u64": 8}.get(kind, 128) for kind, _ in found]
        assert all(bool(array) == (size == 128) for (_, array), size in zip(found, sizes, strict=True))
        # Triton adds two scratch pointers, which the driver passes as null.
        assert sizes == [*map(ctypes.sizeof, values), 8, 8]


@pytest.mark.parametrize("name", ["divided", "persistent", "swap", "swap fp8", "swap mxfp4", "tma"])
def test_barriers_count_the_bytes_that_the_engine_copies(name: str) -> None:
    """What programs wait for is what a map's box holds, copy by copy; else they would hang, or read too early."""
    made = emit_kernel(FUNCS[name](), "cuda:sm_90")
    launch = made.variants[0].config["launches"][0]
    text = made.binaries[launch["file"]].assembly
    maps = [arg for arg in launch["args"] if "map" in arg]
    bytes = {len(map["box"]): math.prod(map["box"]) * DTYPES[map["element"]].itemsize for map in maps}
    assert len(bytes) == len(maps) > 0  # maps of one kernel are told apart by their rank
    copied = [int(rank) for rank in re.findall(r"cp\.async\.bulk\.tensor\.(\d)d\.shared", text)]
    awaited = [int(size) for size in re.findall(r"mbarrier\.arrive\.expect_tx\S* _, \[\S+\], (\d+);", text)]
    assert set(copied) == bytes.keys()
    assert sum(bytes[rank] for rank in copied) == sum(awaited)
