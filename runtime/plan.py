"""What an artifact tells the runtime to do: plain data, read from and written to JSON.

A plan is straight-line: bind symbols from the inputs' shapes, run the steps in order, return the outputs. Values live
in numbered slots. Dimension expressions are strings over symbols (`s0*s1`), with `+ - * // % max min`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Dim: TypeAlias = int | str
"""A size: an int, or an expression over symbols."""

Json: TypeAlias = Any


@dataclass(frozen=True)
class Tensor:
    """Shape and dtype of a slot (`dtype` in MLIR's spelling: f32, bf16, i64, i1, ui8 ...)."""

    shape: tuple[Dim, ...]
    dtype: str


@dataclass(frozen=True)
class Arg:
    """One argument of `main`: where its value comes from.

    `kind` is input | param | buffer | constant. Inputs come from the caller in order; all others from the weights,
    under the name `source`, but for a buffer that starts as `zeros`, which is made where the plan is loaded. `type` is
    None for an integer input, whose value binds the symbol `symbol`.
    """

    name: str
    slot: int
    kind: Literal["input", "param", "buffer", "constant"]
    type: Tensor | None
    source: str = ""
    symbol: str = ""
    zeros: bool = False

    @property
    def stored(self) -> bool:
        """Whether its values are among the weights."""
        return self.kind != "input" and not self.zeros


@dataclass(frozen=True)
class Call:
    """Run a PyTorch operator.

    `op` is `namespace.name.overload`. `args` and `kwargs` are JSON trees in which `{"slot": n}` stands for a value,
    `{"dim": "s0*2"}` for a size, `{"dtype": "bf16"}` for a dtype, `{"float": "inf"}` for a number that JSON lacks,
    `{"memory_format": "contiguous_format"}` for a memory format, `{"device": true}` for the program's device.
    `outs` are the slots of its results (null: not kept); `binds` names symbols that a result's shape gives a value
    to, as `[slot, axis, symbol]` (axis -1: the value itself).
    """

    op: str
    args: list[Json]
    kwargs: dict[str, Json]
    outs: list[int | None]
    binds: list[tuple[int, int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Launch:
    """Run a kernel of the plan on slots; `outs` are allocated by the runtime with the kernel's result types."""

    kernel: str
    ins: list[int | None]
    outs: list[int]


@dataclass(frozen=True)
class Free:
    """Drop slots that no later step reads."""

    slots: list[int]


@dataclass(frozen=True)
class Exchange:
    """Take part in an exchange of rows between ranks (`sparsec.runtime.distributed`).

    | `op` | `ins` | `outs` |
    |---|---|---|
    | `remap` | ids [T, k], slots [P], shares [P] | where [T, k] |
    | `dispatch_start` | x [T, H], where [T, k], weights [T, k] | a handle |
    | `dispatch_wait` | that handle | rows [u, H], local [u, k'], weights [u, k'] |
    | `combine_start` | y [u, H], that handle | another handle |
    | `combine_wait` | the other handle | out [T, H] |

    A handle takes a slot as a tensor does, and each is waited for once. `types` are those of `ins`, None for a handle;
    `binds` is as of `Call`.
    """

    op: Literal["remap", "dispatch_start", "dispatch_wait", "combine_start", "combine_wait"]
    attrs: dict[str, Json]
    ins: list[int]
    outs: list[int]
    types: list[Tensor | None]
    binds: list[tuple[int, int, str]] = field(default_factory=list)


Step: TypeAlias = Call | Launch | Free | Exchange


@dataclass(frozen=True)
class Variant:
    """One way to run a kernel, right for up to `up_to` tokens (None: any number). `config` is the backend's own."""

    up_to: int | None
    config: dict[str, Json]


@dataclass(frozen=True)
class Region:
    """A region of a fused op as steps over slots of its own.

    Args:
        params: types of its arguments, which take slots 0, 1, ...; their bare symbols bind what sizes mention.
        steps: what it computes; no launches, no exchanges.
        outs: the slots that it yields.
    """

    params: tuple[Tensor, ...]
    steps: list[Step]
    outs: list[int]


@dataclass(frozen=True)
class Kernel:
    """A fused op of the model, shared by all layers in which it is the same.

    Args:
        name: its name in the IR (`route_group_0`).
        op: which fused op it is (`moe.layer`, `moe.gather_gemm`, `moe.gemm_combine` ...).
        backend: who runs it: `torch` (steps of PyTorch operators), `onednn`, `triton`, `cpp` (generated C++).
        params: types of its operands, in order (None: an optional operand left out).
        results: types of its results.
        tokens: the dimension that counts tokens; variants are chosen by it.
        attrs: the op's attributes (`k`, `num_experts`, `layout` ...), as JSON.
        regions: the op's regions by name (`router`, `activation`, `tail`; the only one of a route is its `body`).
        variants: by ascending `up_to`; the last has None.
        binaries: of a `cpp` kernel: instruction set -> the file that was compiled for it.
        source: of a `cpp` kernel: the file of its C++.
    """

    name: str
    op: str
    backend: str
    params: tuple[Tensor | None, ...]
    results: tuple[Tensor, ...]
    tokens: Dim
    attrs: dict[str, Json]
    regions: dict[str, Region]
    variants: list[Variant]
    binaries: dict[str, str] = field(default_factory=dict)
    source: str | None = None


@dataclass(frozen=True)
class Output:
    """One result of `main`: returned to the caller, or the new value of the buffer `source`."""

    kind: Literal["output", "mutation"]
    slot: int
    source: str = ""


@dataclass(frozen=True)
class SpreadLayer:
    """One layer of experts that are spread over ranks, by the sources of its arguments.

    Args:
        name: the number of the layer in the model, as a text (`3`; `3.1` for a second one that it has).
        experts: how many it has.
        slots: the buffer [P] i64 that says which expert each slot of all ranks holds.
        shares: the buffer [P] f64, the share of its expert's tokens that each slot gets.
        banks: what each rank has values of its own of: weights [S, ...], row s for its slot s.
    """

    name: str
    experts: int
    slots: str
    shares: str
    banks: list[str]


@dataclass(frozen=True)
class Spread:
    """How a plan that several ranks run together spreads experts over them.

    Args:
        ranks: how many run it.
        width: ranks of a node; the nodes follow one another.
        slots: S, experts of a layer that a rank holds. Slot p of the P = ranks * S is on rank p // S.
        layers: in the order in which they run.
    """

    ranks: int
    width: int
    slots: int
    layers: list[SpreadLayer]


@dataclass(frozen=True)
class Plan:
    """A whole model. `structure` says how the outputs are put together, `inputs` how arguments are taken apart.

    `spread` is None for a plan that one process runs alone.
    """

    args: list[Arg]
    steps: list[Step]
    outputs: list[Output]
    kernels: dict[str, Kernel]
    inputs: Json
    structure: Json
    spread: Spread | None = None

    def local(self) -> set[str]:
        """The sources of weights that each rank has values of its own of."""
        return set() if self.spread is None else {bank for layer in self.spread.layers for bank in layer.banks}
