"""A functional ATen graph, as torch.compile hands it over, as a module in phase `capture`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch.fx import GraphModule

from sparsec.diagnostics import CompileError
from sparsec.frontend.importer import GraphImporter
from sparsec.ir.core import Attr, Module, Value
from sparsec.ir.opdef import make
from sparsec.ir.types import Sym


@dataclass(frozen=True)
class ImportedGraph:
    """A graph in the IR.

    Args:
        module: its placeholders are arguments of `main`, in order, which say by `source` whose they are; constants
            follow.
        constants: the tensors that the graph holds, by source.
        results: for each result of the graph the number of the result of `main`, the size that it is, or None.
    """

    module: Module
    constants: dict[str, torch.Tensor]
    results: list[int | Sym | None]


def import_graph(graph_module: GraphModule, weights: Collection[int] = ()) -> ImportedGraph:
    """Import a graph whose placeholders are tensors and sizes.

    Args:
        weights: numbers of the placeholders that are parameters and buffers of a module.

    Raises: CompileError that names the operator and the user's line, for what the IR cannot hold.
    """
    importer = GraphImporter()
    constants: dict[str, torch.Tensor] = {}
    placeholders = 0
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            kind = "param" if placeholders in weights else "input"
            importer.argument(node, {"kind": kind, "source": node.name})
            placeholders += 1
        elif node.op == "get_attr":
            held = getattr(graph_module, str(node.target))
            if not isinstance(held, torch.Tensor):
                continue  # the body of a higher-order operator
            node.meta.setdefault("val", held)
            constants[str(node.target)] = held
            importer.argument(node, {"kind": "constant", "source": str(node.target)})
    returned = importer.graph(graph_module)
    values = [value for value in returned if isinstance(value, Value)]
    importer.func.result_attrs = {i: dict[str, Attr](kind="output") for i in range(len(values))}
    importer.builder.block.append(make("func.return", values))
    results, count = list[int | Sym | None](), 0
    for i, item in enumerate(returned):
        if isinstance(item, Value):
            results.append(count)
            count += 1
        elif item is None or isinstance(item, Sym):
            results.append(item)
        elif isinstance(item, int) and not isinstance(item, bool):
            results.append(Sym(str(item)))
        else:
            raise CompileError(f"result {i} of the graph is {item!r}, neither a tensor nor a size")
    return ImportedGraph(Module([importer.func], {"phase": "capture", "version": 1}), constants, results)
