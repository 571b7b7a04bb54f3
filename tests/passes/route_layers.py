"""Routers in front of an expert bank, captured for the tests of passes, and compared with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparsec import pipeline
from sparsec.dialects.builtin import Yield
from sparsec.dialects.dtypes import to_torch
from sparsec.dialects.kernel import Launch
from sparsec.dialects.moe import Experts
from sparsec.frontend.importer import import_program
from sparsec.ir.core import Block, Func, Module
from sparsec.ir.interp import evaluate_module
from sparsec.ir.opdef import make
from sparsec.ir.types import Sym, TensorType

HIDDEN = 16
WIDTH = 12


class Layer(nn.Module):
    """A gate and a router behind it: `router(logits, *rows, *params) -> ids, weights, *others`."""

    def __init__(self, router: Any, experts: int, params: tuple[tuple[int, ...], ...] = (), flat: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.flat = router, flat
        self.gate = nn.Parameter(torch.randn(experts, HIDDEN) * 0.5)
        self.params = nn.ParameterList([nn.Parameter(torch.rand(shape)) for shape in params])

    def logits(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.gate)

    def forward(self, x: Tensor, *rows: Tensor) -> Any:
        z = self.logits(x)
        ids, weights, *others = self.router(z.flatten(0, -2) if self.flat else z, *rows, *self.params)
        return (ids.flatten(0, -2), weights.flatten(0, -2), *others)


def captured(layer: nn.Module, *args: Tensor, bank: int) -> tuple[Module, dict[str, Tensor]]:
    """`layer` as IR with its weights; its third result is that of an expert bank which reads the first two."""
    dynamic: list[Any] = [dict.fromkeys(range(max(1, arg.dim() - 1)), torch.export.Dim.DYNAMIC) for arg in args]
    if len(args) > 1:
        dynamic = [{0: torch.export.Dim("tokens")} for _ in args]
    shapes = (dynamic[0], tuple(dynamic[1:])) if len(args) > 1 else (dynamic[0],)
    with torch.no_grad():
        program = torch.export.export(layer.eval(), args, dynamic_shapes=shapes, strict=False)
        module, held = import_program(program.run_decompositions({}))
    main = module.main
    x = next(arg for arg in main.body.args if main.arg_attrs[arg]["kind"] == "input")
    dtype = x.tensor.dtype
    banks = list[Any]()
    for name, shape in ("up", (bank, 2 * WIDTH, HIDDEN)), ("down", (bank, HIDDEN, WIDTH)):
        banks.append(main.body.add_arg(TensorType(shape, dtype), name))
        main.arg_attrs[banks[-1]] = {"kind": "param", "source": name}
    end = main.body.terminator
    ids, weights, *others = end.operands
    row = TensorType((Sym("r"), WIDTH), dtype)
    activation = Block([row, row], ["a", "b"])
    activation.append(Yield([activation.args[0]]))
    rows = (ids.tensor.shape[0], HIDDEN)
    flat = main.body.insert_before(end, make("aten.reshape", [x], [TensorType(rows, dtype)], {"shape": rows}))
    experts = main.body.insert_before(end, Experts([*flat.results, ids, weights, *banks], None, {}, [activation]))
    end.operands = (ids, weights, *experts.results, *others)
    main.result_attrs = {i: {"kind": "output"} for i in range(len(end.operands))}
    return module, held


def left(module: Module) -> list[str]:
    """The ops of main, without views and the return."""
    return [op.name for op in module.main.body.ops if op.name not in ("func.return", "aten.reshape")]


def check(layer: nn.Module, module: Module, held: dict[str, Tensor], *args: Tensor) -> None:
    """The module's ids, weights and other results are those of the layer."""
    with torch.no_grad():
        wanted = layer(*args)
        got = evaluate_module(module, args, {**held, **banks(module)})
    for new, old in zip([*got[:2], *got[3:]], wanted, strict=True):
        if old.dtype.is_floating_point:
            torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(new, old)


def banks(module: Module) -> dict[str, Tensor]:
    """Values for the weights of the bank."""
    named = {str(attrs.get("source")): arg.tensor for arg, attrs in module.main.arg_attrs.items()}
    shapes = [(name, type) for name, type in named.items() if name in ("up", "down")]
    return {name: torch.randn(type.shape, dtype=to_torch(type.dtype)) for name, type in shapes}  # type: ignore[arg-type]


def kernel_of(layer: nn.Module, x: Tensor, *rows: Tensor, bank: int) -> tuple[Func, Callable[..., list[Tensor]]]:
    """The kernel that routes, as the passes make it for a GPU, and a function that gives its operands for inputs."""
    module, held = captured(layer, x, *rows, bank=bank)
    pipeline.run(module, target="cuda:sm_90")
    launch = next(op for op in module.main.body.ops if op.attrs.get("callee") == "route_group_0")
    assert isinstance(launch, Launch)
    wanted = launch.inputs

    def operands(*args: Tensor) -> list[Tensor]:
        end = module.main.body.terminator
        kept = end.operands
        end.operands = tuple(wanted)
        try:
            return evaluate_module(module, args, {**held, **banks(module)})
        finally:
            end.operands = kept

    return module.funcs["route_group_0"], operands
