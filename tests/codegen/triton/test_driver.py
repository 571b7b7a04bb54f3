"""From compiled kernels to the driver, no GPU: what arrives at a launch, byte by byte, is what the image takes."""

from __future__ import annotations

import ast
import ctypes
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from sparsec.codegen.triton import families
from sparsec.codegen.triton.emit import emit_kernel, sketch_kernel
from sparsec.differentiable import backward
from sparsec.ir.core import Func
from sparsec.runtime import gpu_driver, triton_kernels
from sparsec.runtime.context import Context
from sparsec.runtime.dims import compile_dim
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.executor import Program
from sparsec.runtime.plan import Kernel
from tests.codegen.triton import build, small
from tests.codegen.triton.gradients import Bank
from tests.codegen.triton.images import hsaco
from tests.codegen.triton.on_gpu import described
from tests.codegen.triton.packed import packed
from tests.codegen.triton.routers import ROUTERS
from tests.runtime.fake_cuda import MULTIPROCESSORS, STREAM, Launched, Library, library

__all__ = ["library"]
CPU, BF16 = torch.device("cpu"), torch.bfloat16
TILE: dict[str, Any] = {"block_m": 64, "block_n": 64, "block_k": 64, "num_warps": 4, "num_stages": 2}
FEW: dict[str, Any] = {"block_m": 2, "block_n": 8}  #: rows hold whole products in registers
DEEP: dict[str, Any] = {"num_stages": 8, "block_n": 128, "block_m": 128}  #: more shared memory than comes unasked


def silu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(a) * b


def few(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    return {**TILE, **(FEW if family == "rows" else {}), "up_to": 4, "kernel": family, **sizes}


def of_bank(func: Func, family: str, packing: str) -> Func:
    if family == "fp8":
        return packed(func, "fp8", "fp8")
    return func if packing == "plain" else packed(func, packing)


def up(family: str, packing: str = "plain", **sizes: Any) -> Func:
    variants = (few(family, sizes), {**TILE, "kernel": "tiles"})
    made = build.gather_gemm(silu, 128, 128, 4, 2, BF16, variants=variants, listed=True)
    return of_bank(made, family, packing)


def down(family: str, packing: str = "plain", **sizes: Any) -> Func:
    variants = (few(family, sizes), {**TILE, "kernel": "tiles"})
    made = build.gemm_combine(128, 128, 4, 2, BF16, variants=variants, listed=True)
    return of_bank(made, family, packing)


def router(**variant: int) -> Func:
    chosen = ROUTERS["olmoe"]
    params = [torch.rand(shape) for shape in chosen.params]
    variants = (variant, {"block_rows": 4}) if "up_to" in variant else (variant,)
    return build.route_group(chosen, torch.randn(5, chosen.experts), *params, variants=variants, listed=True)


def gradient(op: str, target: str = "cuda:sm_90") -> Func:
    bank = Bank(4, 2, 64, 64, bias=True, dtype=BF16)
    module = backward(bank.kinds()[1], [True] * 6, target)
    return next(func for name, func in module.funcs.items() if name != "main" and func.body.ops[0].name == op)


FUNCS: dict[str, Callable[[], Func]] = {
    "route, many": lambda: router(block_rows=4),
    "route, few": lambda: router(block_rows=8, up_to=8),
    "group": lambda: build.group(8, 2),
    **{f"up {name}": partial(up, name) for name in families.UP},
    **{f"down {name}": partial(down, name) for name in families.DOWN},
    "up gathered, divided": lambda: up("gathered", "plain", **DEEP),
    "down persistent, divided": lambda: down("persistent", "plain", **DEEP),
    "down rows, split": lambda: down("rows", split=2, block_k=32),
    **{f"up {kind}": partial(up, "tiles", kind) for kind in ("fp8", "mxfp4")},
    **{f"up swap {kind}": partial(up, "swap", kind) for kind in ("fp8", "mxfp4")},
    **{f"down swap {kind}": partial(down, "swap", kind) for kind in ("fp8", "mxfp4")},
    **{f"down rows {kind}": partial(down, "rows", kind) for kind in ("fp8", "mxfp4")},
    **{f"gradient {op}": partial(gradient, f"moe.{op}_grad") for op in ("hidden", "bank", "bias")},
}
QUICK = ("route, many", "group", "up tma", "down rows, split", "down persistent, divided")
SOME = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in FUNCS]


def operands(kernel: Kernel, tokens: int) -> list[torch.Tensor | None]:
    def made(dims: Sequence[Any], dtype: str) -> torch.Tensor:
        sizes = [size if isinstance(size := compile_dim(dim), int) else size({"t": tokens}) for dim in dims]
        return torch.zeros(sizes, dtype=DTYPES[dtype])

    return [None if param is None else made(param.shape, param.dtype) for param in kernel.params]


def launched(library: Library, func: Func, tokens: int) -> Iterator[tuple[Any, Launched, dict[str, list[Any]]]]:
    """Of each launch: its entry in the plan, what arrived at the driver, and the tensors that there were."""
    kernel, files = described(func, "cuda:sm_90")
    kept = dict[str, list[Any]](scratch=[])
    empty = torch.empty

    def remembered(*sizes: Any, **options: Any) -> torch.Tensor:
        made = empty(*sizes, **options)
        if options.get("dtype") is torch.uint8:
            kept["scratch"].append(made)
        return made

    call = triton_kernels.bind(kernel, range(len(kernel.params)), Context(CPU, files, lambda slot: None))
    kept["in"] = operands(kernel, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", remembered)
        kept["out"] = list(call(kept["in"]))
    variant = next(v for v in kernel.variants if v.up_to is None or tokens <= v.up_to)
    env = {"t": tokens, "sms": MULTIPROCESSORS}
    ran = [launch for launch in variant.config["launches"] if min(sizes(launch["grid"], env)) > 0]
    assert len(ran) == len(library.launches) and ran
    assert [tensor.numel() for tensor in kept["scratch"]] == sizes(variant.config["scratch"], env)
    for launch, arrived in zip(ran, library.launches, strict=True):
        yield launch, arrived, kept
    library.launches.clear()


def sizes(given: Sequence[Any], env: Mapping[str, int]) -> list[int]:
    return [size if isinstance(size := compile_dim(one), int) else size(env) for one in given]


@pytest.mark.parametrize("name", SOME)
def test_what_arrives_is_what_was_meant(name: str, library: Library) -> None:
    func = FUNCS[name]()
    for tokens in (3, 5):
        env = {"t": tokens, "sms": MULTIPROCESSORS}
        for launch, arrived, kept in launched(library, func, tokens):
            assert (arrived.symbol, arrived.grid) == (launch["symbol"], (*sizes(launch["grid"], env), 1))
            assert (arrived.shared, arrived.stream, arrived.early) == (launch["shared"], STREAM, launch["pdl"])
            values = list(arrived.values)
            for arg in launch["args"]:
                check(library, arg, values, kept, env)
            assert values == [bytes(8)] * 2  # Triton's own scratch memory, of which there is none
    assert library.why == []


ENGINE = [name for name in FUNCS if {*name.replace(",", "").split()} & {"swap", "tma", "persistent", "gathered"}]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in ENGINE])
def test_barriers_wait_for_the_bytes_that_maps_copy(name: str) -> None:
    """Else a program hangs, or multiplies what has not come yet. Maps of one kernel differ in rank."""
    made = emit_kernel(FUNCS[name](), "cuda:sm_90")
    (launch,) = [one for one in made.variants[0].config["launches"] if any("map" in arg for arg in one["args"])]
    text, maps = made.binaries[launch["file"]].assembly, [arg for arg in launch["args"] if "map" in arg]
    bytes = {len(map["box"]): math.prod(map["box"]) * DTYPES[map["element"]].itemsize for map in maps}
    copied = [int(rank) for rank in re.findall(r"cp\.async\.bulk\.tensor\.(\d)d\.shared", text)]
    awaited = [int(size) for size in re.findall(r"mbarrier\.arrive\.expect_tx\S* _, \[\S+\], (\d+);", text)]
    assert len(bytes) == len(maps) and set(copied) == bytes.keys()
    assert sum(bytes[rank] for rank in copied) == sum(awaited)


def check(
    library: Library, arg: Any, values: list[bytes], kept: Mapping[str, list[Any]], env: Mapping[str, int]
) -> None:
    """Take what one argument became off the front of `values`."""
    if "size" in arg:
        assert values.pop(0) == struct.pack("<i", *sizes([arg["size"]], env))
        return
    ((kind, index),) = (arg.get("map") or arg).items()
    found = {**kept}.get(kind)
    at = None if found is None else found[index].data_ptr()  # nobody else holds what outlives calls
    if "map" not in arg:
        (given,) = struct.unpack("<Q", values.pop(0))
        assert given % 16 == 0 and (given == at if at is not None else given)
        return
    map = library.map(values.pop(0))
    shape, strides = sizes(arg["shape"], env), sizes(arg["strides"], env)
    item = DTYPES[arg["element"]].itemsize
    assert map.address == at and map.sizes == tuple(reversed(shape)) and map.box == tuple(reversed(arg["box"]))
    assert map.steps == tuple(stride * item for stride in reversed(strides[:-1])) and map.swizzle == arg["swizzle"]
    assert [values.pop(0) for _ in shape] == [struct.pack("<i", size) for size in shape]
    assert [values.pop(0) for _ in strides] == [struct.pack("<q", stride) for stride in strides]


@pytest.mark.parametrize("name", FUNCS)
def test_parameters_are_passed_in_the_order_of_the_function(name: str) -> None:
    sketch = sketch_kernel(FUNCS[name]())
    heads = {node.name: node.args for node in ast.parse(sketch.source).body if isinstance(node, ast.FunctionDef)}
    for entry in (entry for schedule in sketch.schedules for entry in schedule.entries):
        given = [arg.arg for arg in heads[entry.name].args]
        assert given[: len(entry.parameters)] == [parameter.name for parameter in entry.parameters]
        assert set(given[len(entry.parameters) :]) == set(entry.constants)


def test_maps_are_made_in_a_thread_that_has_no_context_yet(library: Library) -> None:
    """As autograd calls kernels: the driver makes no map there before it is told of the context."""
    kernel, files = described(up("tma"), "cuda:sm_90")
    call = triton_kernels.bind(kernel, range(len(kernel.params)), Context(CPU, files, lambda slot: None))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(call, operands(kernel, 2)).result()
    assert library.why == [] and len(library.launches) == 1 and len(library.maps) == 1


def test_no_tokens(library: Library) -> None:
    """Only the sort has something to write."""
    for func, count in ((router(block_rows=4), 2), (up("tma"), 0), (down("rows"), 0)):
        kernel, files = described(func, "cuda:sm_90")
        call = triton_kernels.bind(kernel, range(len(kernel.params)), Context(CPU, files, lambda slot: None))
        assert all(result.shape[0] in (0, 9, 65) or result.dim() == 3 for result in call(operands(kernel, 0)))
        assert len(library.launches) == count
        library.launches.clear()


@pytest.mark.parametrize("tokens", [1, 40, 3000])
def test_a_whole_layer(tokens: int, library: Library) -> None:
    """From a plan to the driver: what one launch leaves, the next ones read."""
    emitted = small.emitted("cuda:sm_90")
    program = Program(emitted.plan, small.weights(), CPU, files=emitted.files)
    (y,) = program(torch.zeros(tokens, 128, dtype=BF16), torch.zeros(tokens, 8, dtype=BF16))
    assert y.shape == (tokens, 128) and library.why == []
    names = [launch.symbol for launch in library.launches]
    assert names[0].startswith("route_group_0") and names[-1].startswith("gemm_combine_0")
    pointers = [{value for value in launch.values if len(value) == 8} for launch in library.launches]
    assert all(one & other - {bytes(8)} for one, other in pairwise(pointers))
    assert struct.pack("<Q", y.data_ptr()) in pointers[-1]


def test_the_driver_says_what_it_refuses(library: Library) -> None:
    with pytest.raises(ArtifactError, match="cuModuleLoadData failed: error 200: this is no image"):
        gpu_driver.driver().load(b"no image", "k", 128, 0, CPU)
    _, files = described(build.group(8, 2), "cuda:sm_90")
    image = next(content for name, content in files.items() if name.endswith("cubin"))
    with pytest.raises(ArtifactError, match="cuModuleGetFunction failed: error 500: there is no k"):
        gpu_driver.driver().load(image, "k", 128, 0, CPU)


def test_what_is_passed_must_fit_the_image(library: Library) -> None:
    """The stand-in sees wrong threads, too much shared memory and grids that no GPU has."""
    kernel, files = described(build.group(8, 2), "cuda:sm_90")
    launch = kernel.variants[0].config["launches"][0]
    image, symbol, threads = files[launch["file"]], launch["symbol"], launch["threads"]
    values = [0] * 8
    for wrong, grid, message in (
        ((threads + 32, 0), (1, 1), "block"),
        ((threads, 0), (1, 1 << 16), "grid"),
    ):
        with pytest.raises(ArtifactError, match=rf"cuLaunchKernelEx failed: error 1: {symbol}: {message}"):
            gpu_driver.driver().load(image, symbol, *wrong, CPU, early=True)(grid, values)
    with pytest.raises(ArtifactError, match="cuFuncSetAttribute failed"):
        gpu_driver.driver().load(image, symbol, threads, 228 << 10, CPU)


HIP: dict[str, Callable[[], Func]] = {
    **{name: FUNCS[name] for name in ("group", "up tiles", "up rows", "down tiles", "down rows mxfp4")},
    "gradient": lambda: gradient("moe.hidden_grad", "hip:gfx942"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n != "group" else []) for n in HIP])
def test_what_hip_kernels_take(name: str) -> None:
    made = emit_kernel(HIP[name](), "hip:gfx942")
    for variant in made.variants:
        for launch in variant.config["launches"]:
            image = hsaco(made.binaries[launch["file"]].assembly)
            given = [ctypes.sizeof(ctypes.c_int32 if "size" in arg else ctypes.c_void_p) for arg in launch["args"]]
            assert image.sizes == [*given, 8, 8]
            assert image.threads == launch["threads"]
            assert image.shared <= launch["shared"] and launch["pdl"] is False
