"""Runs the Triton kernels of an artifact from their binaries: nothing is compiled.

The `config` of a variant is what `sparsec.codegen.triton` wrote:

    {"target": "cuda:sm_90",
     "choice": {"kernel": "tiles", "block_m": 16, ...},   what was chosen and why, for people
     "scratch": ["t * 64"],                               bytes of each buffer of one call
     "state": [4],                                        bytes of each buffer that is zero between calls
     "launches": [{"file": "kernels/....cubin", "symbol": "...", "grid": ["(t + 15) // 16", "1"],
                   "threads": 128, "shared": 4096, "pdl": true,
                   "args": [{"in": 0}, {"out": 0}, {"scratch": 0}, {"state": 0}, {"size": "t"},
                            {"map": {"in": 1}, "element": "bf16", "shape": ["t", 64], "strides": [64, 1],
                             "box": [128, 64], "swizzle": 3}], ...}]}

Sizes are expressions over `t`, the token count, and `sms`, the multiprocessors of the GPU. A launch with an empty grid
is left out. With `pdl` it may start before the one in front of it has ended. Maps: `runtime/tensor_maps.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from sparsec.runtime import gpu_driver, tensor_maps
from sparsec.runtime.dims import Expr, compile_dim
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.gpu_driver import Program
from sparsec.runtime.plan import Json, Kernel, Variant
from sparsec.runtime.tensor_maps import MapForm, TensorMap

if TYPE_CHECKING:
    from sparsec.runtime.context import Context, KernelCall

ALIGNMENT = 16
"""Bytes that every pointer must be aligned to."""


Place: TypeAlias = tuple[str, int]
"""A tensor: `in`, `out`, `scratch` or `state`, and its index."""
Argument: TypeAlias = "Place | int | Expr | MapOf"
MAX_STATE = 1 << 20
"""Most bytes of one buffer that outlives calls."""


@dataclass(frozen=True)
class MapOf:
    """A tensor map as an argument."""

    place: Place
    form: MapForm


@dataclass(frozen=True)
class Launch:
    """One launch: its program, and where grid and arguments come from."""

    program: Program
    grid: tuple[int | Expr, int | Expr]
    args: tuple[Argument, ...]


@dataclass(frozen=True)
class Run:
    """A variant, ready: what to allocate and launch for up to `up_to` tokens (None: any number)."""

    up_to: int | None
    scratch: tuple[int | Expr, ...]
    state: State
    launches: tuple[Launch, ...]


class State:
    """Buffers that are zero between calls: each stream has its own, since calls on two streams may overlap.

    CUDA graphs share one set, made before any of them: what a graph makes while it is captured is zero only after its
    own first replay. Graphs with the same kernel must therefore not be replayed at the same time.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes, self.device = tuple(sizes), device
        self.buffers: dict[int, list[Tensor]] = {}
        self.of_graphs = self._zeros()

    def here(self) -> list[Tensor]:
        """Those of the current stream, or of graphs while one is captured."""
        if not self.sizes:
            return []
        if _capturing(self.device):
            return self.of_graphs
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        if stream not in self.buffers:
            self.buffers[stream] = self._zeros()
        return self.buffers[stream]

    def _zeros(self) -> list[Tensor]:
        return [torch.zeros(size, dtype=torch.uint8, device=self.device) for size in self.sizes]


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def bind(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall:
    """A kernel of a plan as a function of its operands. Raises: ArtifactError if it cannot run on this device."""
    driver, device = gpu_driver.driver(), context.device
    device = torch.empty(0, device=device).device  # with its index, as tensors say it
    found = gpu_driver.architecture(device)

    def load(config: Json) -> Program:
        name = _text(kernel, config, "file")
        if name not in context.files:
            raise ArtifactError(f"kernel '{kernel.name}' lacks its file '{name}'")
        symbol, threads, shared, early = (config.get(key) for key in ("symbol", "threads", "shared", "pdl"))
        if not isinstance(symbol, str) or not isinstance(threads, int) or not isinstance(shared, int):
            raise ArtifactError(f"kernel '{kernel.name}': '{name}' has no symbol, threads or shared memory size")
        return driver.load(context.files[name], symbol, threads, shared, device, early=early is True)

    for variant in kernel.variants:
        if variant.config.get("target") != found:
            raise ArtifactError(
                f"kernel '{kernel.name}' is compiled for {variant.config.get('target')}, this GPU is {found}: "
                f"compile the model with --target {found}"
            )
    return launcher(kernel, device, load, torch.cuda.get_device_properties(device).multi_processor_count)


def launcher(kernel: Kernel, device: torch.device, load: Callable[[Json], Program], sms: int = 1) -> KernelCall:
    """A kernel as a function of its operands, given how to load one launch's program. Raises: ArtifactError."""
    runs = [_run(kernel, variant, load, device) for variant in kernel.variants]
    if not runs or runs[-1].up_to is not None:
        raise ArtifactError(f"kernel '{kernel.name}' has no variant for every number of tokens")
    at, axis = _place_of_tokens(kernel)
    shapes = [(tuple(compile_dim(dim) for dim in result.shape), DTYPES[result.dtype]) for result in kernel.results]

    def call(ins: Sequence[Tensor | None]) -> Sequence[Tensor]:
        counted = ins[at]
        assert counted is not None
        env = {"t": counted.shape[axis], "sms": sms}
        run = next(run for run in runs if run.up_to is None or env["t"] <= run.up_to)
        given = [_ready(kernel, i, tensor, device) for i, tensor in enumerate(ins)]
        outs = [torch.empty([_value(dim, env) for dim in shape], dtype=dtype, device=device) for shape, dtype in shapes]
        scratch = [torch.empty(_value(size, env), dtype=torch.uint8, device=device) for size in run.scratch]
        tensors: dict[str, list[Any]] = {"in": given, "out": outs, "scratch": scratch, "state": run.state.here()}
        for launch in run.launches:
            x, y = launch.grid
            grid = _value(x, env), _value(y, env)
            if min(grid) > 0:
                launch.program(grid, [_argument(kernel, arg, tensors, env) for arg in launch.args])
        return outs

    return call


def _run(kernel: Kernel, variant: Variant, load: Callable[[Json], Program], device: torch.device) -> Run:
    """Check one variant's config and load its programs. Raises: ArtifactError."""
    scratch, launches, state = (variant.config.get(key) for key in ("scratch", "launches", "state"))
    if not isinstance(scratch, list) or not isinstance(launches, list) or not launches:
        raise ArtifactError(f"kernel '{kernel.name}' has a variant without launches")
    state = [] if state is None else state
    if not isinstance(state, list) or not all(type(size) is int and 0 < size <= MAX_STATE for size in state):
        raise ArtifactError(f"kernel '{kernel.name}': {state!r} are not sizes of at most {MAX_STATE} bytes")
    counts = {"in": len(kernel.params), "out": len(kernel.results), "scratch": len(scratch), "state": len(state)}
    ready = list[Launch]()
    for launch in launches:
        if not isinstance(launch, dict) or not isinstance(launch.get("args"), list):
            raise ArtifactError(f"kernel '{kernel.name}' has a launch without arguments")
        grid = launch.get("grid")
        if not isinstance(grid, list) or len(grid) != 2:
            raise ArtifactError(f"kernel '{kernel.name}': the grid {grid!r} is not a pair of sizes")
        args = tuple(_checked(kernel, arg, counts) for arg in launch["args"])
        ready.append(Launch(load(launch), (_size(kernel, grid[0]), _size(kernel, grid[1])), args))
    held = State(cast("list[int]", state), device)
    return Run(variant.up_to, tuple(_size(kernel, size) for size in scratch), held, tuple(ready))


def _checked(kernel: Kernel, arg: Json, counts: Mapping[str, int]) -> Argument:
    """One argument of a launch. Raises: ArtifactError."""
    if isinstance(arg, dict) and "map" in arg:
        place = _checked(kernel, arg["map"], counts)
        if isinstance(place, tuple):
            return MapOf(place, tensor_maps.parse(f"kernel '{kernel.name}'", arg, lambda size: _size(kernel, size)))
    elif isinstance(arg, dict) and len(arg) == 1:
        ((kind, value),) = arg.items()
        if kind == "size":
            return _size(kernel, value)
        if kind in counts and type(value) is int and 0 <= value < counts[kind]:
            return kind, value
    raise ArtifactError(f"kernel '{kernel.name}' has the launch argument {arg!r}, which names nothing")


def _size(kernel: Kernel, size: Any) -> int | Expr:
    expr = compile_dim(size)
    if isinstance(expr, Expr) and not expr.symbols <= {"t", "sms"}:
        raise ArtifactError(f"kernel '{kernel.name}': the size {size!r} is not one of the token count 't' alone")
    return expr


def _text(kernel: Kernel, config: Json, key: str) -> str:
    if not isinstance(config.get(key), str):
        raise ArtifactError(f"kernel '{kernel.name}' has a launch without '{key}'")
    return str(config[key])


def _place_of_tokens(kernel: Kernel) -> tuple[int, int]:
    """The operand and axis whose size is the token count. Raises: ArtifactError."""
    for i, param in enumerate(kernel.params):
        if param is not None and kernel.tokens in param.shape:
            return i, param.shape.index(kernel.tokens)
    raise ArtifactError(f"kernel '{kernel.name}': no operand's size is its token count '{kernel.tokens}'")


def _ready(kernel: Kernel, i: int, tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """An operand as kernels read it: dense, on the device, aligned."""
    if tensor is None:
        return None
    if tensor.device != device:
        raise InputError(f"operand {i} of kernel '{kernel.name}' is on {tensor.device}, the program runs on {device}")
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _value(size: int | Expr, env: dict[str, int]) -> int:
    return size if isinstance(size, int) else size(env)


def _argument(
    kernel: Kernel, arg: Argument, tensors: Mapping[str, list[Any]], env: dict[str, int]
) -> Tensor | int | TensorMap:
    if isinstance(arg, tuple):
        kind, index = arg
        return tensors[kind][index]
    if isinstance(arg, MapOf):
        kind, index = arg.place
        return arg.form.of(tensors[kind][index], env, f"kernel '{kernel.name}', {kind} {index}")
    size = _value(arg, env)
    if not 0 <= size < 2**31:
        raise InputError(f"{env['t']} tokens are more than kernels count in 32 bits")
    return size
