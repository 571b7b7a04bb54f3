"""sparsec: a graph compiler for sparse expert models.

    import sparsec

    compiled = sparsec.compile(model, (input_ids,))   # callable like the model
    compiled.save("model.sparsec")
    again = sparsec.load("model.sparsec")

    torch.compile(model, backend="sparsec")           # the same compiler inside torch.compile

Names are loaded when first used, so that `import sparsec` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsec import ops
    from sparsec.api import CompiledModel, compile, compile_language_model, load
    from sparsec.diagnostics import CompileError, Diagnostic, Remark, SparsecError
    from sparsec.eager import use_experts
    from sparsec.frontend.adapters.registry import register_experts, unregister_experts
    from sparsec.frontend.capture import Captured, capture
    from sparsec.runtime.errors import ArtifactError, InputError

__version__ = "0.1.0"

_HOME = {
    "compile": "sparsec.api",
    "compile_language_model": "sparsec.api",
    "load": "sparsec.api",
    "CompiledModel": "sparsec.api",
    "capture": "sparsec.frontend.capture",
    "Captured": "sparsec.frontend.capture",
    "register_experts": "sparsec.frontend.adapters.registry",
    "unregister_experts": "sparsec.frontend.adapters.registry",
    "use_experts": "sparsec.eager",
    "CompileError": "sparsec.diagnostics",
    "Diagnostic": "sparsec.diagnostics",
    "Remark": "sparsec.diagnostics",
    "SparsecError": "sparsec.diagnostics",
    "ArtifactError": "sparsec.runtime.errors",
    "InputError": "sparsec.runtime.errors",
}

__all__ = [
    "ArtifactError",
    "Captured",
    "CompileError",
    "CompiledModel",
    "Diagnostic",
    "InputError",
    "Remark",
    "SparsecError",
    "__version__",
    "capture",
    "compile",
    "compile_language_model",
    "load",
    "ops",
    "register_experts",
    "unregister_experts",
    "use_experts",
]


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("sparsec.ops")
    if name not in _HOME:
        raise AttributeError(f"module 'sparsec' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
