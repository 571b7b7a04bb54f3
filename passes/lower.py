"""Move every fused op into a kernel function and launch it; what needs no kernel becomes operators of PyTorch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from sparsec.dialects.builtin import Return
from sparsec.dialects.kernel import Alloc, Launch
from sparsec.dialects.moe import (
    BankGrad,
    BiasGrad,
    ExpertBank,
    GatherGemm,
    GemmCombine,
    Group,
    HiddenGrad,
    Layer,
    Route,
    RouteGroup,
)
from sparsec.ir.core import Attr, Block, Func, Module, Op, Value
from sparsec.ir.equal import Key, ValueMap, clone_op, func_key
from sparsec.ir.opdef import OpDef
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.ir.types import Dim, Sym
from sparsec.passes.base import Pass, PassContext, register
from sparsec.passes.capacity import spell_capacity
from sparsec.passes.fuse import bank_rules
from sparsec.passes.rules import renamers

TOKENS = Sym("t")  #: the number of tokens inside kernel functions


@register
@dataclass(frozen=True)
class LowerKernels(Pass):
    """Outline each fused op into a kernel function, shared where equal, and replace it by buffers and a launch.

    For a GPU, banks that were not split yet are split here; `moe.capacity` becomes operators of PyTorch.
    """

    name: ClassVar[str] = "lower-kernels"

    def run(self, module: Module, ctx: PassContext) -> None:
        kernels: dict[Key, str] = {func_key(f): f.name for f in module.funcs.values() if f.name != "main"}
        numbers = Counter(name.rpartition("_")[0] for name in kernels.values())

        roots = ["moe.route", "moe.route_group", "moe.group", "moe.gather_gemm", "moe.gemm_combine"]
        roots += ["moe.hidden_grad", "moe.bank_grad", "moe.bias_grad"]

        @rule(*roots, *(("moe.experts", "moe.layer") if ctx.target == "cpu" else ()))
        def launch(op: Op, rw: Rewriter) -> bool:
            assert isinstance(op, OpDef)
            if op.block is None or not isinstance(op.block.parent, Func) or op.block.parent.name != "main":
                return False
            kernel = outline(op, backend(op, ctx.target))
            kind = op.name.partition(".")[2]
            name = kernels.setdefault(func_key(kernel), f"{kind}_{numbers[kind]}")
            if name not in module.funcs:
                numbers[kind] += 1
                kernel.name = name
                module.funcs[name] = kernel
            buffers = [rw.insert(Alloc((), [result.type]), op).result for result in op.results]
            new = Launch([_lone(op), tuple(buffers)], None, {"callee": name})
            rw.insert(new, op)
            for old, buffer in zip(op.results, buffers, strict=True):
                buffer.name = f"{old.name}.buffer" if old.name else ""
            rw.replace(op, new.results)
            return True

        ctx.rewrite(module, [*bank_rules(ctx.target), spell_capacity, launch])


def _lone(op: OpDef) -> tuple[Value | None, ...]:
    """The arguments of a fused op, none of which is a list."""
    return tuple(argument for argument in op.arguments if not isinstance(argument, tuple))


def backend(op: OpDef, target: str) -> str:
    """Who runs a fused op: Triton on GPUs; on the CPU a kernel of our own where the banks are packed for it, else
    oneDNN for the GEMMs and PyTorch operators for the rest."""
    if target != "cpu":
        return "triton"
    if isinstance(op, ExpertBank) and op.packing != "plain":
        return "cpp"
    return "onednn" if isinstance(op, ExpertBank | GatherGemm | GemmCombine) else "torch"


def token_dim(op: OpDef) -> Dim:
    """The dimension of a fused op that counts tokens."""
    if isinstance(op, Layer | Route | RouteGroup):
        return op.logits.tensor.shape[0]
    if isinstance(op, Group):
        return op.ids.tensor.shape[0]
    if isinstance(op, ExpertBank | GatherGemm | HiddenGrad):
        return op.x.tensor.shape[0]
    if isinstance(op, BankGrad):
        return op.tokens.tensor.shape[0]
    if isinstance(op, BiasGrad):
        return op.rows.tensor.shape[0]
    assert isinstance(op, GemmCombine)
    return op.weights.tensor.shape[0]


def outline(op: OpDef, backend: str) -> Func:
    """A function that holds a copy of `op`, with its tokens called `t` where their number is not fixed."""
    tokens = token_dim(op)
    map_type, map_attr = renamers(tokens, TOKENS)
    operands = list(dict.fromkeys(op.operands))
    names = dict(zip(op.arguments, op.fields().operands, strict=False))
    body = Block([map_type(value.type) for value in operands], [names.get(value, value.name) for value in operands])
    values: ValueMap = dict(zip(operands, body.args, strict=True))
    inner = clone_op(op, values, map_type, map_attr)
    for result, type in zip(inner.results, inner.infer(), strict=True):
        result.type = type
    body.append(inner)
    body.append(Return(list(inner.results), loc=op.loc))
    attrs: dict[str, Attr] = {"backend": backend, "tokens": TOKENS if isinstance(tokens, Sym) else tokens}
    return Func("", body, attrs, op.loc)
