"""A lowered module as what the runtime takes: a plan, and the files of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from sparsec.codegen.plan import Slots, constants, in_place_updates, tensor
from sparsec.codegen.spread import spread_of
from sparsec.diagnostics import CompileError, Remark
from sparsec.dialects.moe import ExpertBank, GatherGemm
from sparsec.ir.core import Block, Func, Module, Op, Value
from sparsec.ir.derived import is_derivation
from sparsec.ir.opdef import OpDef
from sparsec.ir.types import SymType
from sparsec.runtime.operators import IN_PLACE
from sparsec.runtime.plan import Arg, Json, Kernel, Output, Plan, Region, Variant

if TYPE_CHECKING:
    from sparsec.codegen.triton.emit import TritonKernel


@dataclass(frozen=True)
class Emitted:
    """What `emit` makes.

    Args:
        plan: for `sparsec.runtime`.
        files: sources and binaries of kernels, by relative name.
        remarks: what could not be done as asked, and what was done instead.
        texts: what kernels were compiled to on the way, for people: `kernels/....ttir`, `.ttgir`, `.ptx`.
    """

    plan: Plan
    files: dict[str, bytes] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()
    texts: dict[str, bytes] = field(default_factory=dict)


Edit: TypeAlias = Callable[[str, str], str]
"""Gives the source that is compiled for a kernel's file, `kernels/layer_0.cpp`, and the source that was generated."""


def as_generated(name: str, source: str) -> str:
    """No edit."""
    return source


def emit(
    module: Module,
    target: str,
    inputs: Json = None,
    structure: Json = None,
    *,
    here: bool = False,
    edit: Edit = as_generated,
) -> Emitted:
    """Make plan and kernels of a module after `lower`.

    Args:
        target: `cpu`, `cuda:sm_90`, `hip:gfx942` ...
        inputs, structure: how arguments are taken apart and results put together (`sparsec.runtime.structure`);
            without them arguments and results are flat.
        here: compile native code for this processor only, not for others that an artifact may be loaded on.
        edit: may put another source in the place of a kernel's own.

    Raises:
        CompileError: the target is a GPU and Triton is missing, the module is not lowered, or holds what the runtime
            cannot run, or an edited source fails.
    """
    main = module.main
    emitter = _Emitter(target, main, here, edit)
    fused = (func for func in module.funcs.values() if func.name != "main" and not is_derivation(func))
    kernels = {func.name: emitter.kernel(func) for func in fused}
    _require_lowered(main)
    kinds = {value: str(main.arg_attrs.get(value, {}).get("kind", "input")) for value in main.body.args}
    held = [value for value, kind in kinds.items() if kind != "input"]
    slots = Slots(held)
    args = [_arg(value, slots.define(value), main.arg_attrs.get(value, {})) for value in main.body.args]
    outputs, updates = _outputs(main)
    in_place = {op: buffer for op, buffer in in_place_updates(main.body, updates).items() if _may_update(op)}
    slots.emit(main.body, in_place)
    results = [Output(kind, slots.of[value], source) for kind, value, source in outputs]
    plan = Plan(
        args=args,
        steps=slots.steps,
        outputs=results,
        kernels=kernels,
        inputs=inputs or _flat_inputs(sum(arg.kind == "input" for arg in args)),
        structure=structure or _flat("tuple", sum(output.kind == "output" for output in results)),
        spread=spread_of(module),
    )
    return Emitted(plan, emitter.files, tuple(emitter.remarks), emitter.texts)


class _Emitter:
    """Emits kernel functions, collecting their files and remarks."""

    def __init__(self, target: str, main: Func, here: bool, edit: Edit) -> None:
        self.target, self.main, self.here, self.edit = target, main, here, edit
        self.files: dict[str, bytes] = {}
        self.texts: dict[str, bytes] = {}
        self.remarks: list[Remark] = []

    def kernel(self, func: Func) -> Kernel:
        """The entry of one kernel function, and its files."""
        op = _fused_op(func)
        backend = str(func.attrs.get("backend", "onednn" if self.target == "cpu" else "triton"))
        made: TritonKernel | None = None
        source, binaries = None, dict[str, str]()
        if backend == "triton":
            made = self._triton(func, op)
            backend = "triton" if made is not None else "torch"
        elif backend == "cpp":
            source, binaries = self._cpp(func, op)
            backend = "cpp" if source is not None else "onednn"
        return Kernel(
            name=func.name,
            op=op.name,
            backend=backend,
            params=tuple(None if value is None else tensor(value.tensor) for value in _arguments(op)),
            results=tuple(tensor(value.tensor) for value in op.results),
            tokens=_tokens(func),
            attrs=_attrs(op),
            regions=_regions(op),
            variants=_variants(op) if made is None else list(made.variants),
            binaries=binaries,
            source=source,
        )

    def _triton(self, func: Func, op: Op) -> TritonKernel | None:
        """What the Triton generator makes of a kernel; None, with a remark, where PyTorch has to run it."""
        from sparsec.codegen.triton.compile import require_triton
        from sparsec.codegen.triton.early import may_start
        from sparsec.codegen.triton.emit import compile_sketch, sketch_kernel

        try:
            sketch = sketch_kernel(func)
        except CompileError as error:
            self._missed(op, "PyTorch operators", error)
            return None
        require_triton()  # without it no kernel would be made: no artifact for a GPU
        edited = replace(sketch, source=self.edit(f"kernels/{func.name}.py", sketch.source))
        try:
            made = compile_sketch(func, edited, self.target, may_start(func, self.main))
        except CompileError as error:
            if edited != sketch:
                raise
            self._missed(op, "PyTorch operators", error)
            return None
        self.files |= made.files
        self.texts |= made.texts
        return made

    def _cpp(self, func: Func, op: Op) -> tuple[str | None, dict[str, str]]:
        """The files of a kernel's C++ and of its libraries by instruction set.

        No source, with a remark, where there is no C++ for it; no libraries, with a remark, where nothing compiles it.
        """
        from sparsec.codegen.cpu.emit import emit_kernel

        try:
            source = emit_kernel(func)
        except CompileError as error:
            self._missed(op, "prepacked oneDNN linears", error)
            return None, {}
        name = f"kernels/{func.name}.cpp"
        edited = self.edit(name, source)
        self.files[name] = edited.encode()
        return name, self._libraries(func.name, edited, op, edited != source)

    def _libraries(self, name: str, source: str, op: Op, edited: bool) -> dict[str, str]:
        from sparsec.codegen.cpu.compiler import build_all, build_best

        try:
            made = build_best(source) if self.here else build_all(source)
        except CompileError as error:
            if edited:
                raise
            self._missed(op, "prepacked oneDNN linears", error)
            return {}
        files = {isa: f"kernels/{name}.{isa}.so" for isa in made}
        self.files |= {files[isa]: content for isa, content in made.items()}
        return files

    def _missed(self, op: Op, instead: str, error: CompileError) -> None:
        """Say that a kernel could not be made, and who runs the op instead."""
        why, rule = error.diagnostics[0], "emit_kernel (codegen/emit.py)"
        message = f"{op.name} is run by {instead}: {why.message}"
        self.remarks.append(Remark("missed", "emit", rule, op.loc, message, why.hint))


def _require_lowered(main: Func) -> None:
    left = [op for op in main.body.ops if op.name.startswith("moe.")]
    if left:
        raise CompileError(
            f"'{left[0].name}' is still in @main: only a lowered module can be emitted",
            left[0].loc,
            hint="run the pipeline to the phase `lower` first",
        )


def _fused_op(func: Func) -> Op:
    ops = func.body.ops[:-1]
    if len(ops) != 1 or not ops[0].name.startswith("moe."):
        raise CompileError(f"@{func.name} is no kernel: it holds {len(ops)} ops, a kernel holds one fused op", func.loc)
    return ops[0]


def _arguments(op: Op) -> list[Value | None]:
    """The op's operands with holes; lists laid flat."""
    flat = list[Value | None]()
    for argument in op.arguments:
        flat += argument if isinstance(argument, tuple) else (argument,)
    return flat


def _tokens(func: Func) -> int | str:
    tokens = func.attrs.get("tokens", "t")
    return tokens if isinstance(tokens, int) else str(tokens)


def _attrs(op: Op) -> dict[str, Json]:
    defaults = {"layout": "concat"} if isinstance(op, ExpertBank | GatherGemm) else {}
    return {**defaults, **constants(op.attrs, but=("variants",))}


def _regions(op: Op) -> dict[str, Region]:
    """An op's regions by name."""
    assert isinstance(op, OpDef)
    return {name: region(block) for name, block in zip(op.fields().regions, op.regions, strict=False)}


def region(block: Block) -> Region:
    """A region as steps over slots of its own."""
    slots = Slots(block.terminator.operands)
    for value in block.args:
        slots.define(value)
    slots.emit(block)
    outs = [slots.of[value] for value in block.terminator.operands]
    return Region(tuple(tensor(value.tensor) for value in block.args), slots.steps, outs)


def _variants(op: Op) -> list[Variant]:
    """The op's variants, the last of them for any number of tokens."""
    given: Any = op.attrs.get("variants", ())
    variants = list[Variant]()
    for config in given:
        rest = constants(config, but=("up_to",))
        variants.append(Variant(config.get("up_to"), rest))
    if not variants or variants[-1].up_to is not None:
        variants.append(Variant(None, variants[-1].config if variants else {}))
    return variants


def _arg(value: Value, slot: int, attrs: Mapping[str, Any]) -> Arg:
    kind: Any = attrs.get("kind", "input")
    kind = "param" if kind == "derived" else kind  # computed before it is stored: a weight like any other
    name, source = value.name or f"arg{value.index}", str(attrs.get("source", ""))
    if isinstance(value.type, SymType):
        return Arg(name, slot, kind, None, source, str(value.type.expr))
    return Arg(name, slot, kind, tensor(value.tensor), source, zeros=bool(attrs.get("zeros", False)))


def _outputs(main: Func) -> tuple[list[tuple[Any, Value, str]], dict[Value, Value]]:
    """Results of main as (kind, value, source), and the new value of each buffer that changes."""
    buffers = {attrs.get("source"): value for value, attrs in main.arg_attrs.items() if attrs.get("kind") == "buffer"}
    outputs, updates = list[tuple[Any, Value, str]](), dict[Value, Value]()
    for i, value in enumerate(main.body.terminator.operands):
        attrs = main.result_attrs.get(i, {})
        kind, source = attrs.get("kind", "output"), str(attrs.get("source", ""))
        outputs.append((kind, value, source))
        if kind == "mutation":
            updates[buffers[source]] = value
    return outputs, updates


def _may_update(op: Op) -> bool:
    return op.name.split(".")[0] == "aten" and op.name.split(".")[1] + "_" in IN_PLACE


def _flat(kind: str, count: int) -> Json:
    return {"kind": kind, "items": [{"kind": "leaf", "index": i} for i in range(count)]}


def _flat_inputs(count: int) -> Json:
    return {"args": _flat("tuple", count), "kwargs": {"kind": "dict", "keys": [], "items": []}}
