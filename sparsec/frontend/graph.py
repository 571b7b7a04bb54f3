"""A functional ATen graph, as torch.compile hands it over, as a module in phase `capture`."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from sparsec.diagnostics import CompileError
from sparsec.frontend.importer import GraphImporter
from sparsec.ir.core import Attr, Module, Value
from sparsec.ir.opdef import make


def import_graph(graph_module: GraphModule) -> tuple[Module, dict[str, torch.Tensor]]:
    """The module of a graph whose placeholders are tensors and sizes, and the constants that it holds.

    Every placeholder is an input of `main`, in order; constants follow. `result_places` tells where results that are
    None stood.

    Raises: CompileError that names the operator and the user's line, for what the IR cannot hold.
    """
    importer = GraphImporter()
    constants: dict[str, torch.Tensor] = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            importer.argument(node, {"kind": "input"})
        elif node.op == "get_attr":
            held = getattr(graph_module, str(node.target))
            if not isinstance(held, torch.Tensor):
                continue  # the body of a higher-order operator
            node.meta.setdefault("val", held)
            constants[str(node.target)] = held
            importer.argument(node, {"kind": "constant", "source": str(node.target)})
    results = [value for value in importer.graph(graph_module) if isinstance(value, Value)]
    importer.func.result_attrs = {i: dict[str, Attr](kind="output") for i in range(len(results))}
    importer.builder.block.append(make("func.return", results))
    return Module([importer.func], {"phase": "capture", "version": 1}), constants


def result_places(graph_module: GraphModule) -> list[int | None]:
    """For each result of the graph, which result of the imported `main` it is; None where the graph returns None.

    Raises: CompileError for a graph that returns a size.
    """
    (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
    returned: Any = output.args[0]
    places, count = list[int | None](), 0
    for i, item in enumerate(returned):
        if item is None:
            places.append(None)
        elif isinstance(item, torch.fx.Node) and isinstance(item.meta.get("val"), torch.Tensor):
            places.append(count)
            count += 1
        else:
            raise CompileError(f"result {i} of the graph is a size, which a compiled graph cannot return")
    return places
