"""The expert layers of a model, by structure, and what they are called with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tests.zoo.families import EXPERTS, FAMILIES, inputs

SIZES = (1, 37, 300)  # tokens
SPARE = 4  # classes of a router that are no experts, at most


@dataclass(frozen=True)
class Call:
    """One call of a layer, recorded while its model ran."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    def to(self, dtype: torch.dtype) -> Call:
        """The same in another dtype."""

        def cast(leaf: Any) -> Any:
            return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return Call(*tree_map(cast, (self.args, self.kwargs, self.output)))

    @property
    def tensors(self) -> list[Tensor]:
        """What the layer returned."""
        return tensors_of(self.output)

    @property
    def given(self) -> list[Tensor]:
        """What it was called with."""
        return tensors_of((self.args, self.kwargs))


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in arguments or results of any structure."""
    leaves = tree_leaves(dict(tree) if hasattr(tree, "items") else tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def eager(model: Any) -> Any:
    """`model` with transformers' own loop over the experts, the reference."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def halved(model: Any) -> Any:
    """`model` in bf16, but for the parameters that it keeps in f32."""
    model.to(torch.bfloat16)
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and any(part in name for part in kept):
            tensor.data = tensor.data.float()
    return model


def run(name: str, model: Any, batch: int = 2, length: int = 12) -> Any:
    """The output of a family's model at a batch and length."""
    given: dict[str, Any] = dict(inputs(name, model, batch, length))
    if "input_ids" in given:
        given["use_cache"] = False
    with torch.no_grad():
        return model(**given)


def record(name: str, model: Any, batch: int = 2, length: int = 12) -> dict[str, Call]:
    """The first call of every expert layer, by its path, in order, while the model runs."""
    wanted = list(_candidates(name, model))
    calls = dict[str, Call]()

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            calls.setdefault(path, _copied(Call(args, kwargs, output)))

        return hook

    modules = dict(model.named_modules())
    hooks = [
        modules[path].register_forward_hook(note(path), with_kwargs=True) for path in {p for c in wanted for p in c}
    ]
    try:
        run(name, model, batch, length)
    finally:
        for hook in hooks:
            hook.remove()
    found = (next((path for path in candidates if path in calls), None) for candidates in wanted)
    return {path: calls[path] for path in dict.fromkeys(found) if path is not None}


def record_sizes(name: str, model: Any) -> tuple[dict[str, Call], dict[str, Call], list[dict[str, Call]]]:
    """Calls of the expert layers: two to capture them by, and one for each of three numbers of tokens.

    Some models leave the mask out for few tokens, which makes another program: more tokens then take their place.
    """
    first, second = record(name, model), record(name, model, 3, 17)
    others = list[dict[str, Call]]()
    for size in SIZES:
        for length in (size, size + 8):
            calls = record(name, model, 1, length)
            if all(len(calls[path].given) == len(first[path].given) for path in first):
                break
        others.append(calls)
    return first, second, others


def _copied(call: Call) -> Call:
    """Tensors as they are now, for a layer may write to what it was given; no caches, which export does not take."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().clone()
        return leaf if isinstance(leaf, bool | int | float | str) else None

    kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in call.kwargs.items()}
    return Call(*tree_map(copied, (call.args, kwargs, call.output)))


def _candidates(name: str, model: nn.Module) -> Iterator[list[str]]:
    """For every bank of experts the modules around it that have a router too, from the inside out.

    The innermost of them that is called as a module is the layer.
    """
    modules = dict(model.named_modules())
    if FAMILIES[name].block:
        yield from ([path] for path, module in modules.items() if type(module).__name__ == FAMILIES[name].block)
        return
    for path, module in modules.items():
        if _is_bank(module):
            around = [path.rsplit(".", up)[0] for up in range(path.count(".") + 1)]
            yield [outer for outer in around if _has_router(modules[outer], path.removeprefix(f"{outer}."))]


def _is_bank(module: nn.Module) -> bool:
    """Whether a module holds the weights of all experts, or the experts themselves."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        kinds = [type(child) for child in module.children()]
        return any(kinds.count(kind) == EXPERTS for kind in set(kinds))
    return any(
        p.dim() == 3 and p.shape[0] in range(EXPERTS, EXPERTS + SPARE + 1) and min(p.shape) >= EXPERTS
        for p in module.parameters(recurse=False)
    )


def _has_router(module: nn.Module, bank: str) -> bool:
    """Whether a module has a matrix with a row for each expert that is not the bank's."""
    return any(
        p.dim() == 2 and p.shape[0] in range(EXPERTS, EXPERTS + SPARE + 1)
        for name, p in module.named_parameters()
        if not name.startswith(f"{bank}.") and "bias" not in name
    )
