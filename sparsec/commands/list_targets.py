"""`sparsec targets`."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from sparsec.console import out
from sparsec.targets import TARGETS


def run(as_json: bool) -> None:
    """Print what sparsec compiles for, what of it runs on this machine, and how the CPU's experts do."""
    rows = [(str(target), target.chips, target.obstacle()) for target in TARGETS]
    cpu = cpu_kernels()
    if as_json:
        listed = [{"target": name, "chips": chips, "runs_here": not why, "obstacle": why} for name, chips, why in rows]
        print(json.dumps([{**row, **cpu} if row["target"] == "cpu" else row for row in listed]))
        return
    table = Table("target", "chips", "runs here", box=None, header_style="dim")
    for name, chips, obstacle in rows:
        table.add_row(name, chips, f"no: {obstacle}" if obstacle else "yes")
    out.print(table)
    out.print(f"\nexperts on cpu: {described(cpu)}", soft_wrap=True)


def cpu_kernels() -> dict[str, Any]:
    """What decides how experts run on this CPU.

    Returns: `isas`, the instruction sets that native kernels can use, best first; `compiler`, its version, or "" where
    `no_compiler` says why; `builds`, the sets of this processor that it compiles for; `huge_pages`, as of
    `sparsec.runtime.isa`.
    """
    from sparsec.codegen.cpu import compiler
    from sparsec.runtime import isa

    version, why = "", ""
    try:
        version = compiler.find().version
    except compiler.NoCompiler as error:
        why = error.diagnostics[0].message
    here, known = isa.allowed(), compiler.isas()
    builds = [name for name in here if name in known]
    return {
        "isas": list(here),
        "compiler": version,
        "no_compiler": why,
        "builds": builds,
        "huge_pages": isa.huge_pages(),
    }


def described(cpu: dict[str, Any]) -> str:
    """The same in one line."""
    if not cpu["isas"]:
        return "PyTorch's oneDNN: this processor has no instruction set that native code is made for"
    if not cpu["builds"]:
        why = cpu["no_compiler"] or f"{cpu['compiler']} knows none of {', '.join(cpu['isas'])}"
        return f"PyTorch's oneDNN: {why}; artifacts compiled elsewhere run native code for {cpu['isas'][0]}"
    best, *others = cpu["builds"]
    also = f" (also {', '.join(others)})" if others else ""
    return f"native code for {best}{also}, compiled by {cpu['compiler']}; huge pages: {cpu['huge_pages'] or 'unknown'}"
