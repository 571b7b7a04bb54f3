"""Whatever comes at run time, what runs was compiled ahead: no other key of specialisation can occur."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen.artifact import write_artifact
from sparsec.codegen.triton.compile import compile_entry, load_module, target_of
from sparsec.codegen.triton.emit import sketch_kernel
from sparsec.ir.printer import print_module
from sparsec.runtime.dims import compile_dim
from sparsec.runtime.plan import Kernel
from tests.codegen.triton import small

triton = pytest.importorskip("triton")
TARGET = "cuda:sm_90"
ROOT = Path(__file__).parents[3]


def kernels() -> list[Kernel]:
    return list(small.emitted(TARGET).plan.kernels.values())


def test_the_layer_is_all_triton() -> None:
    assert {kernel.op for kernel in kernels()} == {"moe.route_group", "moe.gather_gemm", "moe.gemm_combine"}
    assert all(kernel.backend == "triton" for kernel in kernels())
    assert not small.emitted(TARGET).remarks


def test_every_entry_has_one_key(tmp_path: Path) -> None:
    """Pointers are aligned to 16 bytes, integers are not specialised, all else is constant: of each launch there is
    one signature, which depends on no argument."""
    seen = 0
    for kernel in kernels():
        sketch = sketch_kernel(small.lowered(TARGET).funcs[kernel.name])
        path = tmp_path / f"{kernel.name}.py"
        path.write_text(sketch.source)
        module: Any = load_module(f"keys_{kernel.name}", path)
        for entry in {entry.name: entry for schedule in sketch.schedules for entry in schedule.entries}.values():
            function = getattr(module, entry.name)
            types = {parameter.name: parameter.type for parameter in entry.parameters}
            assert {p.name for p in function.params if p.is_constexpr} == set(entry.constants)
            assert [p.name for p in function.params if not p.is_constexpr] == list(types)
            for parameter in function.params:
                if not parameter.is_constexpr and not types[parameter.name].startswith(("*", "tensordesc")):
                    assert types[parameter.name] == "i32" and parameter.do_not_specialize, parameter.name
            binary = compile_entry(sketch.source, entry.on(PDL=1, PTX=1), target_of(TARGET), "test")
            head = re.search(r"tt\.func public .*", binary.ttir)
            assert head is not None
            for name, type in types.items():
                given = re.search(rf"%{name}: ([^%]*)", head[0])
                assert given is not None
                assert ("tt.divisibility = 16 : i32" in given[1]) == type.startswith("*"), f"{entry.name}: {given[0]}"
                assert given[1].count("tt.divisibility") <= 1
            seen += 1
    assert seen >= 6


@settings(max_examples=300, deadline=None)
@given(tokens=st.integers(0, 100_000))
def test_every_number_of_tokens_has_its_binaries(tokens: int) -> None:
    files = small.emitted(TARGET).files
    for kernel in kernels():
        ends = [variant.up_to for variant in kernel.variants]
        assert ends[-1] is None and all(end is not None for end in ends[:-1])
        variant = next(v for v in kernel.variants if v.up_to is None or tokens <= v.up_to)
        assert variant.config["target"] == TARGET and variant.config["launches"]
        for launch in variant.config["launches"]:
            assert files[launch["file"]][:4] == b"\x7fELF"
            grid = [compile_dim(size) for size in launch["grid"]]
            sizes = [size if isinstance(size, int) else size({"t": tokens, "sms": 132}) for size in grid]
            assert all(0 <= size < 2**31 for size in sizes)
            if tokens == 0 and kernel.op != "moe.route_group":
                assert min(sizes) == 0


def test_what_runs_it_knows_no_compiler(tmp_path: Path) -> None:
    """An artifact is opened and its kernels are made ready, down to the driver, without Triton or our compiler."""
    text = print_module(small.lowered(TARGET))
    path = write_artifact(tmp_path / "a", small.emitted(TARGET), small.weights(), target=TARGET, text=text)
    code = f"""
import sys, torch
from sparsec.runtime.artifact import open_artifact
from sparsec.runtime.triton_kernels import launcher
artifact = open_artifact({str(path)!r})
loaded = []
for kernel in artifact.plan.kernels.values():
    launcher(kernel, torch.device("cpu"), lambda config: loaded.append(artifact.read(config["file"])))
known = [name for name in sys.modules if name.split(".")[0] == "triton" or name.startswith("sparsec.codegen")]
known += [name for name in sys.modules if name.startswith(("sparsec.passes", "sparsec.ir", "sparsec.dialects"))]
print(len(loaded), known)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    count, _, known = done.stdout.strip().partition(" ")
    assert known == "[]" and int(count) >= 6
