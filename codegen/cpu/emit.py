"""The C++ of a kernel: the layer's headers, what its regions compute, and the sizes that all of it is compiled for.

Headers are written into the text, so that one file is the whole kernel: what is hashed, compiled and shipped. `layer.h`
is the place to start reading.
"""

from __future__ import annotations

import re

from sparsec.codegen.cpu.regions import INCLUDE, activation, router, tail
from sparsec.diagnostics import CompileError
from sparsec.dialects.moe import Layer
from sparsec.dialects.moe.banks import ExpertBank
from sparsec.ir.core import Func, Value
from sparsec.ir.types import DType

ELEMENTS = {DType.bf16: "bf16", DType.f32: "float"}
WEIGHTS = {"tiles": "Unquantised", "int8": "Int8", "int4": "Int4"}
IDS = {DType.i64: "int64_t", DType.i32: "int32_t"}

_INCLUDED = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)


def emit_kernel(func: Func) -> str:
    """The C++ source of a kernel function that holds a `moe.layer` or `moe.experts` on packed banks.

    It compiles for each instruction set of `sparsec.runtime.isa`, and is called as `include/call.h` says.

    Raises: CompileError for a region that no kernel computes, or a type that it does not take.
    """
    op = func.body.ops[0]
    if not isinstance(op, ExpertBank) or op.packing not in WEIGHTS:
        raise CompileError(f"there is no C++ for {op.name} in @{func.name}", op.loc)
    widened = op.packing != "tiles" and op.activations == "model"
    if widened and op.x.tensor.dtype != DType.bf16:
        raise CompileError(f"{op.packing} weights have native code for rows of bf16, these are {op.x.type}", op.loc)
    regions = [activation(op.activation)]
    if isinstance(op, Layer):
        regions.append(router(op.router))
    if op.tail is not None:
        regions.append(tail(op.tail))
    headers = ["layer.h", "rows.h"] if len(regions) > 1 else ["layer.h", "vecmath.h"]
    parts = [
        f"// {op.name}: {op.num_experts} experts, {op.k} of them for each token",
        inlined(headers),
        "namespace {",
        *regions,
        _config(op),
        "}  // namespace\n",
        _ENTRY,
    ]
    return "\n".join(parts)


def inlined(headers: list[str]) -> str:
    """Headers of `include/` as one text, each once and after those that it includes."""
    done = dict[str, str]()

    def visit(name: str) -> None:
        if name in done:
            return
        done[name] = ""
        text = (INCLUDE / name).read_text()
        for needed in _INCLUDED.findall(text):
            visit(needed)
        del done[name]
        done[name] = f"// ---- {name}\n" + _INCLUDED.sub("", text).replace("#pragma once\n", "")

    for name in headers:
        visit(name)
    return "\n".join(done.values())


_ENTRY = """\
typedef Layer<Config> Kernel;
SPARSEC_EXPORT int32_t sparsec_run(const Call* call) { return Kernel::run(call); }
SPARSEC_EXPORT int64_t sparsec_scratch(int64_t tokens, int32_t threads) { return Kernel::scratch(tokens, threads); }
"""


def _config(op: ExpertBank) -> str:
    """The sizes and types of a layer, the places of its operands, and what its regions are called with."""
    ids, weights = (op.ids, op.weights) if isinstance(op, Layer) else op.operands[1:3]
    places = {name: i for i, name in enumerate(_given(op))}
    params = [i for i, name in enumerate(_given(op)) if name.endswith("params")]
    routers = len(op.router_params) if isinstance(op, Layer) else 0
    sizes = {
        "experts": op.num_experts,
        "slots": op.k,
        "hidden": op.x.tensor.shape[-1],
        "width": op.width,
        "columns": op.y_type.shape[-1],
        "parts": op.parts,
        **{name: places.get(name, -1) for name in ("up", "down", "up_bias", "down_bias", "up_scale", "down_scale")},
    }
    flags = {"early": op.weight_on == "input", "has_router": isinstance(op, Layer), "has_tail": op.tail is not None}
    second = "p1" * (op.parts - 1)
    weights_of = WEIGHTS[op.packing]
    lines = [
        "struct Config {",
        f"  typedef {_name(op.x, ELEMENTS)} Elem;",
        f"  typedef {_name(ids, IDS)} Id;",
        f"  typedef {_name(weights, ELEMENTS)} Weight;  // of the router",
        f"  typedef {f'ByInt8<{weights_of}>' if op.activations == 'int8' else weights_of} Weights;",
        *(f"  static constexpr int {name} = {size};" for name, size in sizes.items()),
        *(f"  static constexpr bool {name} = {str(flag).lower()};" for name, flag in flags.items()),
        f"  SPARSEC_INLINE F32 activation(F32 p0, F32 {second}) {{",
        f"    return ::activation(p0{', ' * bool(second)}{second});",
        "  }",
    ]
    if isinstance(op, Layer):
        lines += [
            "  static void route(const Call* call, int64_t row) {",
            f"    const void* in[] = {{{_pointers([1, *params[:routers]])}}};",
            "    route_row(in, row, call->out + 1);",
            "  }",
        ]
    if op.tail is not None:
        lines += [
            "  static void tail(const Call* call, float* y) {",
            f"    const void* params[] = {{{_pointers(params[routers:]) or 'nullptr'}}};",
            "    tail_row(y, y, params);",
            "  }",
        ]
    return "\n".join([*lines, "};"])


def _pointers(places: list[int]) -> str:
    return ", ".join(f"call->in[{place}]" for place in places)


def _given(op: ExpertBank) -> list[str]:
    """For each operand, as the kernel gets them, the name of the field that it belongs to; "" for one left out."""
    names = list(op.fields().operands)  # the last, a list, takes all that are left
    names += names[-1:] * (len(op.arguments) - len(names))
    return ["" if argument is None else name for name, argument in zip(names, op.arguments, strict=False)]


def _name(value: Value, names: dict[DType, str]) -> str:
    dtype = value.tensor.dtype
    if dtype not in names:
        raise CompileError(f"%{value.name} is {value.type}: no kernel reads {dtype.value} there")
    return names[dtype]
