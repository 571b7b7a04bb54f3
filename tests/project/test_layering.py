"""Imports go one way: each package may import the packages that its row names, and nothing above itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMPILER = {"ir", "dialects", "frontend", "passes", "codegen", "pipeline", "inspect"}
MAY_IMPORT: dict[str, set[str]] = {
    # sparsec/__init__.py names the API lazily
    "": COMPILER | {"runtime", "api", "cli", "backend", "hf", "eager", "ops"},
    "__main__": {"cli"},
    "diagnostics": {"ir.loc"},
    "config": set(),
    "targets": set(),
    "ir": set(),
    "dialects": {  # the runtime's layouts and rules, which references are
        "ir",
        *(f"runtime.{name}" for name in ("tiles", "blocks", "gradients", "distributed.remap", "distributed.payload")),
    },
    "frontend": {"ir", "dialects"},
    "passes": {"ir", "dialects"},
    "codegen": {"ir", "dialects", "runtime"},  # only the runtime's data modules: see below
    "pipeline": {"ir", "dialects", "frontend", "passes", "codegen"},
    "ops": {"frontend"},
    "eager": {"frontend", "codegen", "runtime"},
    "hf": {"frontend", "eager"},
    "inspect": COMPILER | {"runtime"},
    "simulate": {"ir", "passes", "runtime.distributed"},  # the best split of a batch: its rule is the runtime's
    "launch": {"ir", "runtime"},
    "devices": {"ir", "passes"},
    "api": COMPILER | {"runtime", "devices"},
    "differentiable": COMPILER | {"launch"},
    "training": COMPILER | {"differentiable"},
    "backend": COMPILER | {"runtime", "api", "launch", "training"},
    "console": COMPILER,
    "commands": COMPILER | {"runtime", "api", "console", "simulate", "devices"},
    "cli": {"commands", "console", "runtime"},
    "runtime": set(),
}
UNDER_ALL = {"diagnostics", "config", "targets", "__version__"}
SHARED_DATA = {
    "artifact", "banks", "code_cache", "dims", "dtypes", "errors", "isa", "operators", "plan", "plan_json", "structure",
}  # fmt: skip
HEAVY = {"torch", "transformers", "triton", "torch_mlir"}
NO_HEAVY_AT_IMPORT = {"", "__main__", "cli", "config", "diagnostics", "ir", "dialects", "passes", "pipeline"}

SOURCES = sorted(
    path for top in ("sparsec", "passes", "codegen", "runtime") for path in (ROOT / top).rglob("*.py") if path.is_file()
)


def module_name(path: Path) -> str:
    """The dotted name below `sparsec`: `ir.core`, `passes.fuse`; "" for the package itself."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "sparsec" else parts
    return ".".join(parts[:-1] if parts and parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a file imports, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layering_problems(module: str, source: str) -> Iterator[str]:
    """Every import of `source` that the table does not allow for `module`."""
    package = module.partition(".")[0]
    allowed = MAY_IMPORT[package] | (set() if package == "runtime" else UNDER_ALL) | ({package} if package else set())
    for line, name in imported(ast.parse(source)):
        if not name.startswith("sparsec."):
            continue
        target = name.removeprefix("sparsec.")
        if not any(target == row or target.startswith(f"{row}.") for row in allowed):
            yield f"{module}:{line} imports {name}; '{package}' may import {', '.join(sorted(allowed)) or 'nothing'}"


def at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported, less those under `if TYPE_CHECKING`."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import_time(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from at_import_time(getattr(node, field, []))


def heavy_imports(source: str) -> Iterator[str]:
    """Heavy libraries that a module loads as soon as it is imported."""
    for node in at_import_time(ast.parse(source).body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"line {node.lineno}: {name}" for name in names if name.partition(".")[0] in HEAVY)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    module = module_name(path)
    assert module.partition(".")[0] in MAY_IMPORT, f"'{module}' has no row in the table: decide what it may import"
    assert list(layering_problems(module, path.read_text())) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_compiler_core_loads_no_torch(path: Path) -> None:
    if module_name(path).partition(".")[0] in NO_HEAVY_AT_IMPORT:
        assert list(heavy_imports(path.read_text())) == []


def test_codegen_uses_only_the_runtimes_data() -> None:
    """Code generation shares the formats of plans and artifacts with the runtime, and runs nothing of it."""
    for path in SOURCES:
        if module_name(path).startswith("codegen"):
            names = [name for _, name in imported(ast.parse(path.read_text())) if name.startswith("sparsec.runtime.")]
            assert [name for name in names if name.split(".")[2] not in SHARED_DATA] == [], path


def test_the_checks_find_planted_faults() -> None:
    assert list(layering_problems("ir.core", "from sparsec.dialects import moe"))
    assert list(layering_problems("passes.fuse", "def f():\n    import sparsec.codegen.emit"))
    assert list(layering_problems("runtime.executor", "from sparsec.diagnostics import CompileError"))
    assert not list(layering_problems("passes.fuse", "from sparsec.ir.core import Op\nimport json"))
    assert list(heavy_imports("try:\n    import torch\nfinally:\n    pass"))
    assert not list(heavy_imports("if TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"))
