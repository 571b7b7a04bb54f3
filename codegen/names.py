"""Names of variables in a kernel's text."""

from __future__ import annotations

import re

from sparsec.ir.core import Value


class Names:
    """Hands out variables after the IR's names, each once, and none of those that are taken from the start."""

    def __init__(self, *reserved: str) -> None:
        self.taken = set(reserved)

    def fresh(self, wanted: str) -> str:
        """A variable that was not handed out yet. No underscores at its ends: C++ keeps some of these for itself."""
        base = re.sub(r"\W", "_", wanted).strip("_").lower() or "v"
        base = base if base[0].isalpha() else f"v{base}"
        name, n = base, 1
        while name in self.taken:
            n += 1
            name = f"{base}_{n}"
        self.taken.add(name)
        return name

    def of(self, value: Value) -> str:
        """A variable for a value of the IR."""
        return self.fresh(value.name or (value.op.name.split(".")[1] if value.op is not None else "arg"))
