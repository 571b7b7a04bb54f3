"""Update buffers where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.ir.core import Func, Module, Op
from sparsec.ir.rewrite import Rewriter, rule
from sparsec.passes.base import Pass, PassContext, register

_IN_PLACE = {name: f"{name}_" for name in ("aten.index_copy", "aten.index_put", "aten.copy", "aten.scatter.src")}
_IN_PLACE["aten.scatter.src"] = "aten.scatter_.src"


@register
@dataclass(frozen=True)
class ReinplaceBuffers(Pass):
    """Let an update write into its buffer, where the old contents have no other reader and the result is the buffer's
    new value: `aten.index_copy` becomes `aten.index_copy_`."""

    name: ClassVar[str] = "reinplace-buffers"

    def run(self, module: Module, ctx: PassContext) -> None:
        main = module.main

        @rule(*_IN_PLACE)
        def update_in_place(op: Op, rw: Rewriter) -> bool:
            buffer = op.operands[0]
            source = main.arg_attrs.get(buffer, {}).get("source")
            if main.arg_attrs.get(buffer, {}).get("kind") != "buffer" or not _becomes(op, main, source):
                return False
            if buffer.users != {op: 1}:
                ctx.missed(op, why=f"buffer '{source}' is copied: its old contents are read elsewhere")
                return False
            rw.replace_op(op, _IN_PLACE[op.name], op.arguments, op.attrs)
            return True

        ctx.rewrite(module, [update_in_place])


def _becomes(op: Op, main: Func, source: object) -> bool:
    """Whether the op's result is the new value of the buffer `source`."""
    returned = main.body.terminator.operands
    return any(
        attrs.get("kind") == "mutation" and attrs.get("source") == source and returned[i] is op.results[0]
        for i, attrs in main.result_attrs.items()
    )
