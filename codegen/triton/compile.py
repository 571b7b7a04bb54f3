"""Ahead-of-time compilation of generated Triton, for GPUs that need not be there.

Every entry point is compiled for exactly one signature: pointers aligned to 16 bytes, sizes not specialised. What is
compiled here is all that will ever run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

from sparsec.codegen.triton.launch import Entry
from sparsec.diagnostics import CompileError

ALIGNMENT = 16
"""Bytes that every pointer is aligned to; the runtime sees to it."""

MOST_REGISTERS = 65536
"""Of a multiprocessor of NVIDIA's, shared out to the threads of a program."""

NO_OPTIONS: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: Triton's backend and architecture, and what one program may use of shared memory."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int

    @property
    def hopper(self) -> bool:
        """Whether it has a copy engine for tensors (TMA) and programmatic dependent launch."""
        return self.backend == "cuda" and int(self.arch) >= 90

    @property
    def e4m3(self) -> bool:
        """Whether its tensor cores multiply e4m3 as it is stored everywhere; gfx942 has another."""
        return self.hopper or self.arch == "gfx950"


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("cuda:sm_80", "cuda", 80, 32, 163 * 1024),
        Target("cuda:sm_90", "cuda", 90, 32, 227 * 1024),
        Target("cuda:sm_100", "cuda", 100, 32, 227 * 1024),
        Target("hip:gfx942", "hip", "gfx942", 64, 64 * 1024),
        Target("hip:gfx950", "hip", "gfx950", 64, 160 * 1024),
    )
}
"""The GPU targets, by the names users give."""


@dataclass(frozen=True)
class Binary:
    """One compiled entry point.

    Args:
        symbol: its name in the image.
        image: the cubin or hsaco.
        assembly: PTX or AMD assembly, for people and tests.
        ttir: Triton's own IR, which says what one program loads, multiplies and stores.
        ttgir: the same with layouts in registers and shared memory.
        threads: threads of one program.
        shared: dynamic shared memory, in bytes.
        num_stages: pipeline stages, lowered where the variant's did not fit.
        maps: of each tensor descriptor in order, what the host's must say: `box` (sizes of one copy), `swizzle` (of
            16-byte units in shared memory: 0 none, 1, 2, 3 within 32, 64, 128 bytes).
        registers, spills: registers per thread and bytes (NVIDIA) or registers (AMD) spilled; None where not known.
    """

    symbol: str
    image: bytes
    assembly: str
    ttir: str
    ttgir: str
    threads: int
    shared: int
    num_stages: int
    maps: tuple[Mapping[str, Any], ...]
    registers: int | None
    spills: int | None

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.image).hexdigest()


_CACHE: dict[str, Binary] = {}


def target_of(name: str) -> Target:
    """The target a user named. Raises: CompileError with those that there are."""
    if name not in TARGETS:
        raise CompileError(f"no GPU target '{name}'", hint=f"targets: {', '.join(TARGETS)}")
    return TARGETS[name]


def compile_entry(source: str, entry: Entry, target: Target, what: str) -> Binary:
    """Compile one entry point of a generated module; equal ones are compiled once per process.

    Args:
        source: the module's text.
        what: the kernel and variant, for messages.

    Raises:
        CompileError: Triton is missing, refuses the text, or the program cannot fit into shared memory.
    """
    signature = [(parameter.name, parameter.type) for parameter in entry.parameters]
    identity = repr((source, entry.name, signature, sorted(entry.constants.items()), entry.num_warps, entry.num_stages))
    key = hashlib.sha256(f"{identity} {target}".encode()).hexdigest()
    if key not in _CACHE:
        _CACHE[key] = _fitting(source, entry, target, what)
    return _CACHE[key]


def _fitting(source: str, entry: Entry, target: Target, what: str) -> Binary:
    """Compile with as many stages as fit."""
    stages = max(1, entry.num_stages)
    binary = _compile(source, entry, target, stages, what)
    while binary.shared > target.shared_limit and stages > 1:
        stages -= 1
        binary = _compile(source, entry, target, stages, what)
    if binary.shared <= target.shared_limit:
        if binary.spills and target.backend == "cuda":
            # ptxas may spill far below what a thread can have; told how many registers there are, it does not.
            most = min(255, MOST_REGISTERS // binary.threads // 8 * 8)
            again = _compile(source, entry, target, stages, what, {"maxnreg": most})
            binary = min(binary, again, key=lambda one: one.spills or 0)
        return binary
    raise CompileError(
        f"{what}: '{entry.name}' needs {binary.shared} bytes of shared memory, {target.name} has {target.shared_limit}",
        hint="give this variant smaller tiles (block_m, block_n, block_k)",
    )


def _compile(
    source: str, entry: Entry, target: Target, stages: int, what: str, options: Mapping[str, int] = NO_OPTIONS
) -> Binary:
    triton = require_triton()
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.errors import TritonError

    names = [parameter.name for parameter in entry.parameters]
    types = {parameter.name: parameter.type for parameter in entry.parameters}
    aligned = {(names.index(n),): [["tt.divisibility", ALIGNMENT]] for n, type in types.items() if type[0] == "*"}
    with _module(source) as module:
        function = getattr(module, entry.name)
        signature = {**types, **dict.fromkeys(entry.constants, "constexpr")}
        src = ASTSource(function, signature, constexprs=dict(entry.constants), attrs=aligned)
        try:
            compiled = triton.compile(
                src,
                target=GPUTarget(target.backend, target.arch, target.warp_size),
                options={"num_warps": entry.num_warps, "num_stages": stages, **options},
            )
        except (TritonError, RuntimeError) as error:
            raise CompileError(f"{what}: Triton cannot compile '{entry.name}' for {target.name}: {error}") from error
    metadata = compiled.metadata
    if any(getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")):
        raise CompileError(f"{what}: '{entry.name}' wants scratch memory of Triton's own, which no artifact provides")
    maps = _maps(entry, target, metadata, compiled.asm.get("ttgir", ""), what)
    cuda = target.backend == "cuda"
    text: Any = compiled.asm
    image, assembly = text["cubin" if cuda else "hsaco"], text["ptx" if cuda else "amdgcn"]
    registers, spills = _usage_cuda(image, metadata.name) if cuda else _usage_hip(assembly)
    threads = metadata.num_warps * target.warp_size
    own = text["ttir"], text.get("ttgir", "")
    return Binary(metadata.name, image, assembly, *own, threads, metadata.shared, stages, maps, registers, spills)


def _maps(entry: Entry, target: Target, metadata: Any, layouts: str, what: str) -> tuple[Mapping[str, Any], ...]:
    """What the compiled program wants of its tensor descriptors. `layouts`: its text in Triton's GPU dialect.

    Raises: CompileError where the target has none, or one is copied in blocks of several sizes.
    """
    wanted = sum("map" in parameter.argument for parameter in entry.parameters)
    found: Any = getattr(metadata, "tensordesc_meta", None) or ()
    if not wanted:
        return ()
    if len(found) != wanted or any(meta["fp4_padded"] for meta in found):
        raise CompileError(f"{what}: '{entry.name}' takes tensor descriptors, which {target.name} does not have")
    copied, maps = _copied(layouts), list[Mapping[str, Any]]()
    if len(copied) != wanted or any(len(shapes) != 1 for shapes in copied.values()):
        raise CompileError(f"{what}: '{entry.name}' copies tensors in blocks that are not of one size each: {copied}")
    for meta, shapes in zip(found, copied.values(), strict=True):
        box = list(meta["block_size"])
        for shape in shapes:  # without leading ones; larger than the box where it takes several copies
            box[-len(shape) :] = [min(pair) for pair in zip(box[-len(shape) :], shape, strict=True)]
        maps.append({"box": box, "swizzle": meta["swizzle"]})
    return tuple(maps)


def _copied(layouts: str) -> dict[str, set[tuple[int, ...]]]:
    """The shapes in which each descriptor is copied: the parameters in their order, and any other name there may be.

    What Triton says of a descriptor is the block that the kernel's text names. Where it divides the work between
    groups of warps, each copies its share of the rows, and the engine must be told so: it copies what the box says.
    """
    signature = re.search(r"tt\.func public @.*", layouts)
    found = dict[str, set[tuple[int, ...]]]()
    for name in re.findall(r"(%\w+): !tt\.tensordesc<", signature[0]) if signature else []:
        found[name] = set()
    for name, sides in re.findall(r"async_tma_copy_global_to_local (%\w+)\[.*-> !ttg\.memdesc<((?:\d+x)+)", layouts):
        found.setdefault(name, set()).add(tuple(int(side) for side in sides.split("x") if side))
    return found


def require_triton() -> Any:
    """Triton, ready to compile. Raises: CompileError."""
    try:
        import triton
        from triton import knobs
    except ImportError as error:
        raise CompileError(f"compiling for a GPU needs Triton: {error}", hint="pip install triton") from error
    if knobs.runtime.interpret:
        raise CompileError("Triton is in interpreter mode", hint="unset TRITON_INTERPRET to compile for a GPU")
    return triton


@contextmanager
def _module(source: str) -> Generator[ModuleType]:
    """A generated module, imported from a folder of its own; Triton's cache lies there too, and both go at the end."""
    knobs: Any = require_triton().knobs
    name = "sparsec_generated_" + hashlib.sha256(source.encode()).hexdigest()[:16]
    with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
        path = Path(folder, f"{name}.py")
        path.write_text(source, encoding="utf-8")
        with knobs.cache.scope(), knobs.compilation.scope():
            knobs.cache.dir = str(Path(folder, "cache"))
            knobs.compilation.disable_line_info = True  # it would hold the folder's name
            try:
                yield load_module(name, path)
            finally:
                sys.modules.pop(name, None)


def load_module(name: str, path: Path) -> ModuleType:
    """Import a generated module from its file."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _usage_cuda(image: bytes, symbol: str) -> tuple[int | None, int | None]:
    """Registers, and bytes of the stack where the code uses it; None where the tools that read a cubin are missing.

    ptxas leaves a stack of a few bytes in programs that neither store nor load there: those spill nothing.
    """
    found = re.search(rf"Function {re.escape(symbol)}:\s+REG:(\d+) STACK:(\d+)", _read_cubin(image, "-res-usage"))
    if found is None:
        return None, None
    registers, stack = int(found[1]), int(found[2])
    code = _read_cubin(image, "-sass") if stack else ""
    return registers, stack if not code or re.search(r"\b(STL|LDL)\b", code) else 0


def _read_cubin(image: bytes, what: str) -> str:
    """What cuobjdump says of a cubin; "" where it is missing."""
    import triton

    tool = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=False).stdout


def _usage_hip(assembly: str) -> tuple[int | None, int | None]:
    registers = re.search(r"\.vgpr_count:\s+(\d+)", assembly)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)
    return (int(registers[1]) if registers else None), (int(spills[1]) if spills else None)
