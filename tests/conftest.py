"""Golden files of passes: `tests/passes/PASS/*.sparsec`.

    // pass: raise-route{max-ops=64}
    // target: cuda:sm_90                      (optional)
    // tolerance: 1e-6                         (optional: by how much floats may differ; else they are the same bits)
    module ...
    // ----- expect
    module ...

The passes named are run on the first module, and the result must be the second one, by structure: names and locations
do not count. `pytest --update` rewrites the second module. Without one the passes must change nothing. A comment
`// expected-remark {{text}}` at the end of an op's line says that a pass declines there, and why; every missed remark
must be expected. Each file is also round-tripped through both text forms, and both modules are evaluated on random
inputs, which must give the same bits.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparsec.diagnostics import SparsecError

EXPECT = "// ----- expect"
SIZES = (3, 5, 7, 2)  # of the first symbols; `t` and the like come after


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update", action="store_true", help="rewrite the expected modules of golden files")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    if file_path.suffix == ".sparsec" and file_path.parent.parent.name == "passes":
        return GoldenFile.from_parent(parent, path=file_path)
    return None


class GoldenFile(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield GoldenItem.from_parent(self, name=self.path.stem)


class GoldenError(Exception):
    """A golden file that does not hold; its text says how."""


class GoldenItem(pytest.Item):
    """One file."""

    def runtest(self) -> None:
        from sparsec import pipeline
        from sparsec.ir.equal import clone_module, equal
        from sparsec.ir.parser import parse_module
        from sparsec.ir.printer import print_module

        text = self.path.read_text()
        given, _, expected = text.partition(EXPECT)
        header = dict(re.findall(r"^// (pass|target|tolerance): *(.*?) *$", given, re.MULTILINE))
        if "pass" not in header:
            raise GoldenError("the first lines need `// pass: NAME`")
        before = parse_module(given, self.path.name)
        after = clone_module(before)
        result = pipeline.run_passes(after, header["pass"], target=header.get("target", "cpu"))
        round_trip(before)
        round_trip(after)
        check_remarks(given, before, [remark for remark in result.remarks if remark.kind == "missed"])
        same_results(before, after, float(header.get("tolerance", 0)))
        changed = not equal(before, after)
        if changed != any(record.changed for record in result.records):
            raise GoldenError(f"the passes {'hide' if changed else 'claim'} a change")
        if self.config.getoption("--update"):
            tail = f"{EXPECT}\n\n{print_module(after)}" if changed else ""
            self.path.write_text(f"{given.rstrip()}\n\n{tail}".rstrip() + "\n")
            return
        wanted = parse_module(expected, self.path.name) if expected.strip() else before
        if not equal(wanted, after):
            old, new = print_module(wanted).splitlines(), print_module(after).splitlines()
            raise GoldenError("\n".join(difflib.unified_diff(old, new, "expected", "actual", lineterm="")))

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, GoldenError | SparsecError):
            return f"{self.path}\n{excinfo.value}\n(rewrite with `pytest --update`)"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"golden {self.name}"


def round_trip(module: Any) -> None:
    """Print and read in both forms; the same text and the same module must come back."""
    from sparsec.ir.equal import equal
    from sparsec.ir.mlir import print_generic
    from sparsec.ir.parser import parse_module
    from sparsec.ir.printer import print_module

    text = print_module(module)
    again = parse_module(text)
    if print_module(again) != text or not equal(again, module):
        raise GoldenError(f"the short form does not round-trip:\n{text}")
    if not equal(parse_module(print_generic(module)), module):
        raise GoldenError(f"the generic form does not round-trip:\n{print_generic(module)}")


def check_remarks(text: str, module: Any, missed: list[Any]) -> None:
    """Every `expected-remark` is met by a missed remark at the location of its line's op, and every one is expected."""
    ops = {result.name: op for op in module.walk() for result in op.results}
    for line in text.splitlines():
        for wanted in re.findall(r"// expected-remark \{\{(.*?)\}\}", line):
            name = re.search(r"%([\w.$-]+)", line)
            op = ops[name[1]] if name else None
            found = [r for r in missed if op is not None and r.loc == op.loc and wanted in r.message]
            if not found:
                raise GoldenError(f"no remark says {wanted!r} at: {line.strip()}\nthere are: {missed}")
            missed.remove(found[0])
    if missed:
        raise GoldenError(f"remarks that nobody expects: {missed}")


def same_results(before: Any, after: Any, tolerance: float) -> None:
    """Both modules give the same bits on random inputs, or floats that differ by no more than `tolerance`."""
    import torch

    from sparsec.ir.interp import evaluate_module

    inputs, weights = random_inputs(before)
    results = [evaluate_module(module, inputs, weights) for module in (before, after)]
    for i, (old, new) in enumerate(zip(*results, strict=True)):
        allowed = tolerance if old.dtype.is_floating_point else 0.0
        if not torch.allclose(old.nan_to_num(), new.nan_to_num(), rtol=0.0, atol=allowed):
            raise GoldenError(f"result {i} differs by {(old.double() - new.double()).abs().max().item():.2e}")


def random_inputs(module: Any, seed: int = 0) -> tuple[list[Any], dict[str, Any]]:
    """Values for the arguments of `main`: floats normal, integers below 8."""
    import torch

    from sparsec.dialects.dtypes import to_torch
    from sparsec.ir.derived import placement_tables
    from sparsec.ir.types import SymType, evaluate, symbols

    main, rng = module.main, torch.Generator().manual_seed(seed)
    dims = [dim for arg in main.body.args if not isinstance(arg.type, SymType) for dim in arg.type.shape]
    names = dict.fromkeys(name for dim in dims for name in symbols(dim))
    sizes = dict(zip(names, (*SIZES, *range(11, 99, 2)), strict=False))
    inputs, weights, tables = list[Any](), dict[str, Any](), placement_tables(module)
    for arg in main.body.args:
        attrs = main.arg_attrs.get(arg, {})
        if attrs.get("source") in tables:
            continue  # those of an even placement
        if isinstance(arg.type, SymType):
            value: Any = evaluate(arg.type.expr, sizes)
        else:
            shape = [evaluate(dim, sizes) for dim in arg.type.shape]
            normal = torch.randn(shape, generator=rng) * (1.0 if len(shape) < 3 else 0.2)
            whole = torch.randint(0, 8, shape, generator=rng)
            value = (normal if arg.type.dtype.is_float else whole).to(to_torch(arg.type.dtype))
        if attrs.get("kind", "input") == "input":
            inputs.append(value)
        else:
            weights[str(attrs["source"])] = value
    return inputs, weights
