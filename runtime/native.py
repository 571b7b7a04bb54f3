"""Runs the native kernels of a plan, and says why where it cannot.

A kernel comes as one library per instruction set. The best one that this processor has is run, without asking if this
user's own compiler made it (`sparsec.runtime.code_cache`), else only where the caller trusts the artifact.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsec.runtime import isa
from sparsec.runtime.code_cache import made_here
from sparsec.runtime.context import Choice, Context, KernelCall, Operand
from sparsec.runtime.dims import Expr, compile_dim
from sparsec.runtime.dtypes import DTYPES
from sparsec.runtime.errors import ArtifactError, InputError
from sparsec.runtime.native_library import Call, Library, LibraryRefused, Scratch, load, team, threads

if TYPE_CHECKING:
    from sparsec.runtime.plan import Dim, Kernel

UNTRUSTED = "the native code was not compiled here; if you trust who made it, load with trust_code=True (--trust-code)"

_log = logging.getLogger("sparsec")
_scratch = Scratch()


def bind(kernel: Kernel, slots: Sequence[int | None], context: Context) -> KernelCall | None:
    """A native kernel as a function of its operands; None where it cannot run, for the reason in `context.paths`.

    Raises: ArtifactError if files of the kernel are missing, or it has no token count.
    """

    def digest(file: str) -> str:
        if file not in context.files:
            raise ArtifactError(f"kernel '{kernel.name}' lacks its file '{file}'")
        return hashlib.sha256(context.files[file]).hexdigest()

    path = choose(kernel.binaries, digest, context.trust_code)
    if path.isa is not None:
        try:
            library = load(context.files[kernel.binaries[path.isa]])
        except LibraryRefused as error:
            path = Choice(None, str(error))
        else:
            context.paths[kernel.name] = path
            return launcher(kernel, library)
    if path not in context.paths.values():
        kept = "; activations are not rounded to int8 there" if kernel.attrs.get("activations") == "int8" else ""
        _log.warning("experts run on %s%s", path, kept)
    context.paths[kernel.name] = path
    return None


def choose(binaries: Mapping[str, str], digest: Callable[[str], str], trust_code: bool = False) -> Choice:
    """Who is to run a kernel.

    Args:
        binaries: instruction set -> file.
        digest: gives the SHA-256 of a file.
        trust_code: whether to run what others compiled.
    """
    if not binaries:
        return Choice(None, "there was no C++ compiler when it was compiled")
    allowed = isa.allowed()
    chosen = next((name for name in allowed if name in binaries), None)
    if chosen is None:
        has = ", ".join(allowed) or f"none of {', '.join(isa.ISAS)}"
        return Choice(None, f"the native code is for {', '.join(binaries)}, this processor has {has}")
    if not trust_code and not made_here(digest(binaries[chosen])):
        return Choice(None, UNTRUSTED)
    return Choice(chosen)


def launcher(kernel: Kernel, library: Library) -> KernelCall:
    """A kernel as a function of its operands, given its library; may be called by several threads at once.

    Raises: ArtifactError if no operand's size is the token count.
    """
    name, counted = kernel.name, _place_of_tokens(kernel)
    types = [None if param is None else (DTYPES[param.dtype], _shape(kernel, param.shape)) for param in kernel.params]
    results = [(DTYPES[result.dtype], _shape(kernel, result.shape)) for result in kernel.results]
    varies = [param is None or any(isinstance(dim, str) for dim in param.shape) for param in kernel.params]
    states = _States(len(types), len(results))

    def operand(i: int, given: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """An operand as the kernel reads it: of the type that it was compiled for, dense. Raises: InputError."""
        if given is None or given.dtype is not dtype or given.shape != shape or not given.is_cpu:
            found = "nothing" if given is None else f"{given.dtype} {list(given.shape)} on {given.device}"
            raise InputError(f"operand {i} of kernel '{name}' is {found}, not {dtype} {list(shape)} on the CPU")
        return given.contiguous()

    def call(ins: Sequence[Operand]) -> Sequence[Tensor]:
        tokens = counted(ins)
        make = torch.empty if tokens else torch.zeros
        outs = [make(shape(tokens), dtype=dtype, device="cpu") for dtype, shape in results]
        if not tokens:
            return outs
        state = states.own
        kept = list[Tensor]()  # copies, for as long as the kernel reads them
        for i, (given, type) in enumerate(zip(ins, types, strict=True)):
            if type is None or (given is not None and given is state.seen[i] and given.data_ptr() == state.ins[i]):
                continue
            dtype, shape = type
            ready = operand(i, given, dtype, shape(tokens))
            kept.append(ready)
            state.ins[i] = ready.data_ptr()
            # A weight stays what it is: the next launch knows it by its identity and place.
            state.seen[i] = None if varies[i] or ready is not given else given
        for i, out in enumerate(outs):
            state.outs[i] = out.data_ptr()
        with_threads = threads()
        block = state.call
        block.tokens, block.threads = tokens, with_threads
        pool = team() if with_threads > 1 else None
        block.parallel, block.barrier = (pool.parallel, pool.barrier) if pool else (None, None)
        if state.sized != (tokens, with_threads):
            state.needs = library.scratch(tokens, with_threads)
            if state.needs < 0:
                raise RuntimeError(f"kernel '{name}' asks for {state.needs} bytes of scratch for {tokens} tokens")
            state.sized = tokens, with_threads
        block.scratch = _scratch.at_least(state.needs)
        status = library.run(state.reference)
        if status:
            raise RuntimeError(f"kernel '{name}' refused {tokens} tokens on {with_threads} threads (status {status})")
        return outs

    return call


class _State:
    """What a launch fills in."""

    def __init__(self, ins: int, outs: int) -> None:
        self.ins = (ctypes.c_void_p * ins)()
        self.outs = (ctypes.c_void_p * outs)()
        self.call = Call(ins=self.ins, outs=self.outs)
        self.reference = ctypes.byref(self.call)
        self.seen: list[Tensor | None] = [None] * ins
        self.sized: tuple[int, int] = (0, 0)
        self.needs = 0


class _States(threading.local):
    """One for each thread."""

    def __init__(self, ins: int, outs: int) -> None:
        self.own = _State(ins, outs)


def _place_of_tokens(kernel: Kernel) -> Callable[[Sequence[Operand]], int]:
    """How to read the number of tokens off the operands. Raises: ArtifactError."""
    if isinstance(kernel.tokens, int):
        number = kernel.tokens
        return lambda ins: number
    for i, param in enumerate(kernel.params):
        if param is not None and kernel.tokens in param.shape:
            axis = param.shape.index(kernel.tokens)

            def size(ins: Sequence[Operand], i: int = i, axis: int = axis) -> int:
                given = ins[i]
                if given is None or given.dim() <= axis:
                    raise InputError(f"operand {i} of kernel '{kernel.name}' has no axis {axis}")
                return given.shape[axis]

            return size
    raise ArtifactError(f"kernel '{kernel.name}': no operand's size is its token count '{kernel.tokens}'")


def _shape(kernel: Kernel, shape: Sequence[Dim]) -> Callable[[int], tuple[int, ...]]:
    """A shape as a function of the number of tokens. Raises: ArtifactError for a size that it does not give."""
    symbol, dims = str(kernel.tokens), tuple(map(compile_dim, shape))
    if any(isinstance(dim, Expr) and dim.symbols != frozenset({symbol}) for dim in dims):
        raise ArtifactError(f"kernel '{kernel.name}' has the shape {list(shape)}, which '{symbol}' does not give")
    sizes = tuple(dim for dim in dims if isinstance(dim, int))
    if len(sizes) == len(dims):
        return lambda tokens: sizes
    if shape[0] == symbol and len(sizes) == len(dims) - 1:
        return lambda tokens: (tokens, *sizes)
    return lambda tokens: tuple(dim if isinstance(dim, int) else dim({symbol: tokens}) for dim in dims)
