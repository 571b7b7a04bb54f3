"""Decides whether a plan may run, before anything of it does.

Checked: slots are defined before they are read and exist, operators are allowed and get arguments that fit their
schemas, sizes are expressions over symbols that have a value by then, in-place updates touch buffers only, launches
fit their kernels, exchanges between ranks are brought to their end (`runtime.check_spread`), and the structure trees
fit the outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sparsec.runtime import structure
from sparsec.runtime.check_spread import Handles, check_spread
from sparsec.runtime.dims import Expr, compile_dim
from sparsec.runtime.errors import ArtifactError
from sparsec.runtime.operators import dims_of, problems, resolve, slots_of, updates
from sparsec.runtime.plan import Call, Exchange, Free, Kernel, Launch, Plan, Region, Step, Tensor

MAX_SLOTS = 1_000_000
MAX_RANK = 64


def check_plan(plan: Plan, allow: Collection[str] = ()) -> None:
    """Raises: ArtifactError with the first problem found. `allow` is as of `operators.resolve`."""
    for name, kernel in plan.kernels.items():
        _check_kernel(kernel, f"kernel '{name}'", allow)
        if kernel.name != name:
            raise ArtifactError(f"kernel '{name}' calls itself '{kernel.name}'")
    defined, known = set[int](), set[str]()
    for arg in plan.args:
        if arg.slot in defined:
            raise ArtifactError(f"argument '{arg.name}' takes slot {arg.slot}, which is taken")
        defined.add(_in_range(arg.slot))
        if arg.type is None:
            if arg.kind != "input" or not arg.symbol.isidentifier():
                raise ArtifactError(f"argument '{arg.name}' has neither a type nor a symbol")
            known.add(arg.symbol)
        elif arg.kind == "input":
            known |= _bare(arg.type)
        elif not arg.source:
            raise ArtifactError(f"argument '{arg.name}' names no source")
        if arg.zeros and arg.kind != "buffer":
            raise ArtifactError(f"argument '{arg.name}' is a {arg.kind} of zeros: only a buffer can be")
    for arg in plan.args:
        if arg.type is not None:
            _check_type(arg.type, known if arg.kind == "input" else (), f"argument '{arg.name}'")
    buffers = {arg.slot: arg.source for arg in plan.args if arg.kind == "buffer"}
    check_spread(plan)
    handles = Handles.of(plan)
    live = _check_steps(plan.steps, defined, known, set(buffers), plan.kernels, allow, "step", handles)
    handles.finish()
    for i, output in enumerate(plan.outputs):
        if output.slot not in live:
            raise ArtifactError(f"output {i} reads slot {output.slot}, which holds no value at the end")
        if output.kind == "mutation" and output.source not in buffers.values():
            raise ArtifactError(f"output {i} updates '{output.source}', which is no buffer of the plan")
    _check_trees(plan)


def _check_trees(plan: Plan) -> None:
    inputs = [arg for arg in plan.args if arg.kind == "input"]
    outputs = [output for output in plan.outputs if output.kind == "output"]
    if set(plan.inputs) != {"args", "kwargs"}:
        raise ArtifactError("the plan's inputs are not {args, kwargs}")
    for part, kinds in (("args", ("tuple", "list")), ("kwargs", ("dict",))):
        tree = plan.inputs[part]
        if not isinstance(tree, dict) or tree.get("kind") not in kinds:
            raise ArtifactError(f"the plan's inputs: {part} is not a {kinds[0]}")
    leaves = [leaf for part in ("args", "kwargs") for leaf in structure.check(plan.inputs[part], f"inputs.{part}")]
    if sorted(leaves) != list(range(len(inputs))):
        raise ArtifactError(f"the plan has {len(inputs)} inputs, its structure has leaves {sorted(leaves)}")
    leaves = list(structure.check(plan.structure, "structure"))
    if not set(leaves) <= set(range(len(outputs))):
        raise ArtifactError(f"the plan has {len(outputs)} outputs, its structure has leaves {sorted(leaves)}")


def _check_kernel(kernel: Kernel, where: str, allow: Collection[str]) -> None:
    known = set[str]()
    for param in kernel.params:
        known |= _bare(param) if param is not None else set()
    for type in (*(param for param in kernel.params if param is not None), *kernel.results):
        _check_type(type, known, where)
    _check_dim(kernel.tokens, known, where)
    for name, region in kernel.regions.items():
        _check_region(region, f"{where}, {name}", allow)
    if (kernel.binaries or kernel.source is not None) and kernel.backend != "cpp":
        raise ArtifactError(f"{where} has files of C++, but its backend is '{kernel.backend}'")
    bounds = [variant.up_to for variant in kernel.variants]
    finite = [bound for bound in bounds if bound is not None]
    if not bounds or bounds[-1] is not None or None in bounds[:-1] or finite != sorted(set(finite)):
        raise ArtifactError(f"{where}: its variants do not cover every token count in ascending order")


def _check_region(region: Region, where: str, allow: Collection[str]) -> None:
    known = set[str]()
    for type in region.params:
        known |= _bare(type)
    for type in region.params:
        _check_type(type, known, where)
    defined = set(range(len(region.params)))
    live = _check_steps(region.steps, defined, known, set(), {}, allow, f"{where}, step", Handles(None))
    if not set(region.outs) <= live:
        raise ArtifactError(f"{where} yields a slot that holds no value")


def _check_steps(
    steps: Iterable[Step],
    defined: set[int],
    known: set[str],
    buffers: set[int],
    kernels: dict[str, Kernel],
    allow: Collection[str],
    what: str,
    handles: Handles,
) -> set[int]:
    """Check steps in order. Returns: the slots that hold a tensor at the end. `defined` and `known` grow in place."""
    for i, step in enumerate(steps):
        where = f"{what} {i}"
        if isinstance(step, Free):
            tensors = handles.free(step.slots, where)
            _read(tensors, defined, where)
            defined.difference_update(tensors)
        elif isinstance(step, Exchange):
            _read(handles.take(step, where), defined, where)
            for type in step.types:
                if type is not None:
                    _check_type(type, known, where)
            defined.update(map(_in_range, handles.give(step, defined, where)))
            _check_binds(step, where, known)
        elif isinstance(step, Launch):
            kernel = kernels.get(step.kernel)
            if kernel is None:
                raise ArtifactError(f"{where} launches '{step.kernel}', which the plan does not have")
            _read([slot for slot in step.ins if slot is not None], defined, where)
            holes = [slot is None for slot in step.ins]
            if holes != [param is None for param in kernel.params] or len(step.outs) != len(kernel.results):
                raise ArtifactError(f"{where} does not give kernel '{step.kernel}' the operands that it takes")
            defined.update(map(_in_range, step.outs))
        else:
            _check_call(step, where, defined, known, buffers, allow)
    return defined


def _check_call(
    step: Call, where: str, defined: set[int], known: set[str], buffers: set[int], allow: Collection[str]
) -> None:
    op = resolve(step.op, allow)
    for problem in problems(op, step.args, step.kwargs):
        raise ArtifactError(f"{where} ({step.op}) {problem}")
    trees = [*step.args, *step.kwargs.values()]
    _read([slot for tree in trees for slot in slots_of(tree)], defined, where)
    for tree in trees:
        for dim in dims_of(tree):
            _check_dim(dim, known, where)
    if updates(op) and not (step.args and next(slots_of(step.args[0]), None) in buffers):
        raise ArtifactError(f"{where} ({step.op}) changes a value that is no buffer")
    several = any("List" in str(ret.type) for ret in op._schema.returns)
    if not several and len(step.outs) != len(op._schema.returns):
        raise ArtifactError(f"{where} ({step.op}) has {len(step.outs)} results, it returns {len(op._schema.returns)}")
    defined.update(_in_range(slot) for slot in step.outs if slot is not None)
    _check_binds(step, where, known)


def _check_binds(step: Call | Exchange, where: str, known: set[str]) -> None:
    for slot, _, symbol in step.binds:
        if slot not in step.outs or not symbol.isidentifier():
            raise ArtifactError(f"{where} binds '{symbol}' to slot {slot}, which is not its result")
        known.add(symbol)


def _read(slots: Iterable[int], defined: set[int], where: str) -> None:
    for slot in slots:
        if slot not in defined:
            raise ArtifactError(f"{where} reads slot {slot}, which holds no value")


def _in_range(slot: int) -> int:
    if slot >= MAX_SLOTS:
        raise ArtifactError(f"slot {slot} is beyond the {MAX_SLOTS} that a plan may use")
    return slot


def _bare(type: Tensor) -> set[str]:
    """The symbols that stand alone as a dimension: the shape gives them a value."""
    return {dim for dim in type.shape if isinstance(dim, str) and dim.isidentifier()}


def _check_type(type: Tensor, known: Collection[str], where: str) -> None:
    if len(type.shape) > MAX_RANK:
        raise ArtifactError(f"{where} has {len(type.shape)} dimensions")
    for dim in type.shape:
        _check_dim(dim, known, where)
        if isinstance(dim, int) and dim < 0:
            raise ArtifactError(f"{where} has the size {dim}")


def _check_dim(dim: int | str, known: Collection[str], where: str) -> None:
    expr = compile_dim(dim)
    unknown = expr.symbols - set(known) if isinstance(expr, Expr) else ()
    if unknown:
        raise ArtifactError(f"{where} uses the symbol '{min(unknown)}', which has no value there")
