"""Which slots of a plan hold expert banks that no operator but the expert kernels reads."""

from __future__ import annotations

from collections.abc import Collection

from sparsec.runtime.operators import slots_of
from sparsec.runtime.plan import Call, Exchange, Launch, Plan, Step

BANKS: dict[str, tuple[int, ...]] = {
    "moe.experts": (3, 4, 5, 6, 7, 8),
    "moe.layer": (2, 3, 4, 5, 6, 7),
    "moe.gather_gemm": (3, 4),
    "moe.gemm_combine": (4, 5),
}
"""Which operands of a fused op are banks, their biases and scales: once packed, the originals are not needed."""


def reads_of(step: Step) -> list[int]:
    """The slots that a step reads, repeats included."""
    if isinstance(step, Call):
        return [slot for tree in (*step.args, *step.kwargs.values()) for slot in slots_of(tree)]
    return [slot for slot in step.ins if slot is not None] if isinstance(step, Launch | Exchange) else []


def bank_slots(plan: Plan, native: Collection[str] = ()) -> set[int]:
    """Slots that only expert kernels made of PyTorch operators read, as banks: those hold packed copies and need no
    tensor in the slot. Native kernels read their banks from the slot, as they lie in the artifact; `native` names
    those that do run.
    """
    banks, others = set[int](), {output.slot for output in plan.outputs}
    changing = {arg.slot for arg in plan.args if arg.kind in ("input", "buffer")}
    for step in plan.steps:
        kernel = plan.kernels[step.kernel] if isinstance(step, Launch) else None
        packs = kernel is not None and kernel.backend in ("torch", "onednn", "cpp") and kernel.name not in native
        places = BANKS.get(kernel.op, ()) if kernel is not None and packs else ()
        reads = step.ins if isinstance(step, Launch) else reads_of(step)
        banks |= {slot for i, slot in enumerate(reads) if i in places and slot is not None}
        others |= {slot for i, slot in enumerate(reads) if i not in places and slot is not None}
    return banks - others - changing
