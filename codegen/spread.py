"""How a placed module is spread over ranks, as a plan says it."""

from __future__ import annotations

from sparsec.diagnostics import CompileError
from sparsec.ir.core import Module, Op
from sparsec.ir.derived import PLACEMENT, derivations, leaves_of
from sparsec.runtime.plan import Spread, SpreadLayer


def spread_of(module: Module) -> Spread | None:
    """What `main` spreads over ranks; None for a module that one device runs.

    Raises: CompileError where a rank's own weight has not a row for each of its slots.
    """
    remaps = [op for op in module.main.body.ops if op.name == "dist.remap"]
    if not remaps:
        return None
    start = next(op for op in module.main.body.ops if op.name == "dist.dispatch_start")
    ranks, width, slots = (_whole(start, name) for name in ("ranks", "width", "slots"))
    sources = {arg: str(attrs.get("source", "")) for arg, attrs in module.main.arg_attrs.items()}
    made, layers = derivations(module), dict[str, SpreadLayer]()
    for op in remaps:
        table, shares = (sources.get(value, "") for value in op.operands[1:3])
        if not table.startswith(PLACEMENT) or not shares.startswith(PLACEMENT):
            raise CompileError("the tables of 'dist.remap' are no arguments of @main", op.loc)
        banks = [source for source in made if table in leaves_of(source, made)]
        _check(module, op, banks, slots)
        name = table.removeprefix(PLACEMENT).rpartition("/")[0]
        layers[name] = SpreadLayer(name, _whole(op, "experts"), table, shares, banks)
    return Spread(ranks, width, slots, list(layers.values()))


def _whole(op: Op, name: str) -> int:
    value = op.attrs[name]
    assert isinstance(value, int)
    return value


def _check(module: Module, op: Op, banks: list[str], slots: int) -> None:
    for arg, attrs in module.main.arg_attrs.items():
        if attrs.get("source") in banks and arg.tensor.shape[:1] != (slots,):
            raise CompileError(f"%{arg.name} is {arg.type}: a rank's own weight has a row for each of {slots}", op.loc)
