"""Runs artifacts and plans. Imports no compiler module: an artifact runs without the compiler being loaded.

    from sparsec.runtime import load

    program = load("olmoe.sparsec")
    out = program.call((input_ids,))

Names are loaded when first used: the compiler reads `sparsec.runtime.plan` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsec.runtime.artifact import Artifact, load, open_artifact
    from sparsec.runtime.errors import ArtifactError, InputError, RankError
    from sparsec.runtime.executor import Program

_HOME = {
    "Artifact": "artifact",
    "load": "artifact",
    "open_artifact": "artifact",
    "ArtifactError": "errors",
    "InputError": "errors",
    "RankError": "errors",
    "Program": "executor",
}

__all__ = ["Artifact", "ArtifactError", "InputError", "Program", "RankError", "load", "open_artifact"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsec.runtime' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"sparsec.runtime.{_HOME[name]}"), name)
    globals()[name] = value
    return value
