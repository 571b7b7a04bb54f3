"""`costs.json` of a dump: what each op of `main` moves and computes, for the page's table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsec.inspect.costs import SERVER, op_costs, roof, sizes
from sparsec.inspect.dump import write_atomic
from sparsec.ir.core import Module, Op
from sparsec.passes.chips import CHIPS

FILE = "costs.json"


def write_costs(folder: Path, module: Module) -> Path:
    """Write the costs of a module into a dump's folder, with the times of its target once it has one."""
    target = str(module.attrs.get("target", ""))
    on = SERVER if target == "cpu" else roof(target) if target in CHIPS else None
    env = sizes(module, {})
    costs = op_costs(module, env, on)
    rows = [
        {**_place(op), "bytes": cost.bytes, "flops": cost.flops, "us": cost.us, "limiter": cost.limiter}
        for op, cost in costs.items()
        if op.block is module.main.body and (cost.bytes or cost.flops)
    ]
    data = {"version": 1, "chip": on.name if on else "", "sizes": env, "ops": rows}
    write_atomic(path := folder / FILE, json.dumps(data, separators=(",", ":")) + "\n")
    return path


def _place(op: Op) -> dict[str, Any]:
    callee = op.attrs.get("callee")
    named = {"callee": str(callee)} if callee is not None else {}
    value = op.results[0].name if op.results else ""
    loc = op.loc
    return {"op": op.name, **named, "value": value, "file": loc.file, "line": loc.line, "scope": loc.scope}
