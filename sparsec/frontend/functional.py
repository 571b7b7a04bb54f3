"""Expert layers as functions of tensors, for models and adapters: each call is one operator of a captured graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from sparsec.diagnostics import CompileError
from sparsec.frontend import experts_op, pair_ops, region

Bank = Tensor | Sequence[Tensor] | nn.ParameterList
"""The weights of all experts, [E, ...], or one tensor per expert, which the compiler stacks once."""

assert experts_op.TARGET and pair_ops.CAPACITY  # registered by being imported


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Bank,
    down: Bank,
    *,
    activation: Callable[..., Tensor],
    gate: Bank | None = None,
    up_bias: Bank | None = None,
    gate_bias: Bank | None = None,
    down_bias: Bank | None = None,
    interleaved: bool = False,
    up_transposed: bool = False,
    down_transposed: bool = False,
    weight_on: Literal["output", "input"] = "output",
    tail: Callable[..., Tensor] | None = None,
    tail_params: Sequence[Tensor] = (),
) -> Tensor:
    """For each token the weighted sum of down(activation(gate(x), up(x))) over the experts that it chose.

    Args:
        x: [..., H], floating point; leading dimensions are tokens.
        ids: [T, k], integers, T tokens in the order of `x`. Outside 0..E-1: the pair costs nothing and adds nothing.
        weights: [T, k], floating point.
        up: [E, I, H], or with both halves in one weight [E, 2I, H] (first I rows: gate). A list of E weights is
            stacked.
        down: [E, H, I].
        activation: (gate, up) -> [r, I], or (up) -> [r, I] for experts without a gate; any pointwise operators. It is
            recorded, not called with data. `glu(silu)` is silu(gate) * up. Under torch.compile it must be a function of
            a module, a module, or a `functools.partial` of these: a closure over a module is none that it can keep.
        gate: [E, I, H] where it is a weight of its own.
        up_bias, gate_bias, down_bias: [E, I or 2I], [E, I], [E, H].
        interleaved: whether gate and up rows of one weight alternate.
        up_transposed, down_transposed: weights are [E, H, I or 2I] and [E, I, H].
        weight_on: "input" multiplies x by the weight in front of the up-projection, and adds the results unweighted.
        tail: (y, *tail_params) -> [r, H], what becomes of each expert's rows before they are weighed, such as a norm.
            A module's own parameters and buffers are found.
        tail_params: tensors that `tail` reads besides.

    Returns: [..., H], dtype of `x`. Sums are made in f32, in the order of the slots.
    Raises: CompileError for an activation that is not pointwise or a tail that is not row by row; ValueError for
        shapes that do not fit.
    """
    up_, down_ = _stacked(up), _stacked(down)
    bias = _stacked(up_bias)
    if gate is not None:
        if interleaved:
            raise ValueError("interleaved gate and up rows are rows of one weight: leave out `gate`")
        gate_ = _stacked(gate)
        if gate_.shape != up_.shape:
            raise ValueError(f"gate is {[*gate_.shape]}, up {[*up_.shape]}")
        up_ = torch.cat([gate_, up_], 2 if up_transposed else 1)
        if (gate_bias is None) != (bias is None):
            raise ValueError("gate and up have a bias both or none: give zeros for the other")
        bias = torch.cat([_stacked(gate_bias), bias], 1) if bias is not None else None
    width = down_.shape[1 if down_transposed else 2]
    rows = up_.shape[2 if up_transposed else 1]
    if up_.shape[0] != down_.shape[0]:
        raise ValueError(f"up has {up_.shape[0]} experts, down {down_.shape[0]}")
    if rows not in (width, 2 * width):
        raise ValueError(
            f"up gives {rows} columns and down takes {width}: expected {width}, or {2 * width} with a gate "
            "(up_transposed and down_transposed say how the weights lie)"
        )
    given: Any = activation
    # Of a partial function torch.compile keeps no constant, but of its parts.
    parts = (given.func, *given.args) if isinstance(given, partial) else (given,)
    parts = tuple(id(part) if isinstance(part, nn.Module) else part for part in parts)  # no constant of every dynamo
    text, layout = _activation(width, rows == 2 * width, interleaved, x.dtype, *parts)
    more: dict[str, Any] = {"weight_on": weight_on} if weight_on != "output" else {}
    if tail is not None:
        params = (*tensors_of(tail), *tail_params)
        columns = down_.shape[2 if down_transposed else 1]
        more |= {"tail": tail_region(columns, x.dtype, tail, *kinds_of(params)), "tail_params": params}
    y = torch.ops.sparsec.experts(
        x.reshape(-1, x.shape[-1]),
        ids.reshape(-1, ids.shape[-1]),
        weights.reshape(-1, weights.shape[-1]),
        up_,
        down_,
        bias,
        _stacked(down_bias),
        activation=text,
        layout=layout,
        up_transposed=up_transposed,
        down_transposed=down_transposed,
        **more,
    )
    return y.reshape(*x.shape[:-1], y.shape[-1])


def glu(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The gated activation act(gate) * up, for `experts`."""
    return partial(_gated, act)


def _gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def grouped_linear(
    x: Tensor,
    ids: Tensor,
    w: Bank,
    bias: Bank | None = None,
    *,
    weights: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """One linear layer per expert: w[ids[t, j]] applied to the row of each (token, slot) pair.

    Args:
        x: [T, H], the same row for all k slots of a token, or [T, k, H].
        ids: [T, k], integers; outside 0..E-1 the result is zero.
        w: [E, N, H], or [E, H, N] if `transposed`; a list of E weights is stacked.
        bias: [E, N].
        weights: [T, k]; if given, the results of a token are weighed and added, in f32.

    Returns: [T, k, N], or [T, N] with `weights`; dtype of `x`.
    """
    return torch.ops.sparsec.grouped_linear(x, ids, _stacked(w), _stacked(bias), weights, transposed=transposed)


def capacity(
    ids: Tensor, num_experts: int, capacity: int, *, order: Literal["slot", "token"] = "slot", groups: int = 1
) -> Tensor:
    """Let each expert take at most `capacity` pairs: an id beyond becomes `num_experts`, which `experts` skips.

    Args:
        ids: [T, k], integers.
        order: "slot" counts all tokens' first choices, then all second ones; "token" counts token by token.
        groups: T / groups consecutive tokens are counted alone, as where each sequence of a batch has its own count.

    Returns: [T, k], dtype of `ids`.
    """
    return torch.ops.sparsec.capacity(ids, num_experts, capacity, order=order, groups=groups)


def _stacked(bank: Any) -> Any:
    return torch.stack(list(bank)) if isinstance(bank, list | tuple | nn.ParameterList) else bank


_by_id: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def module_of(number: int) -> nn.Module:
    """The module with this id: on older versions of torch a module is no constant of a traced graph, its id is."""
    if (known := _by_id.get(number)) is None:
        known = _by_id[number] = next(o for o in gc.get_objects() if id(o) == number and isinstance(o, nn.Module))
    return known


@torch._dynamo.assume_constant_result
def _activation(width: int, gated: bool, interleaved: bool, dtype: torch.dtype, *parts: Any) -> tuple[str, str]:
    fn, *held = (module_of(part) if isinstance(part, int) else part for part in parts)

    def whole(projected: Tensor) -> Tensor:
        if not gated:
            return fn(*held, projected)
        if interleaved:
            return fn(*held, projected[..., ::2], projected[..., 1::2])
        return fn(*held, *projected.chunk(2, dim=-1))

    try:
        layout, text = region.record(whole, width, gated, dtype)
    except region.UnsupportedActivation as error:
        raise CompileError(
            f"the activation of these experts is not pointwise over the rows of an expert: {error}",
            hint="write it as a function of the gate half and the up half, e.g. silu(gate) * up",
        ) from error
    return text, layout


def tensors_of(fn: Any) -> tuple[Tensor, ...]:
    """The parameters and buffers that a tail brings along."""
    return (*fn.parameters(), *fn.buffers()) if isinstance(fn, nn.Module) else ()


def kinds_of(tensors: Sequence[Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes, as constants that torch.compile can keep."""
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


@torch._dynamo.assume_constant_result
def tail_region(
    width: int, dtype: torch.dtype, fn: Callable[..., Tensor], *params: tuple[tuple[int, ...], torch.dtype]
) -> str:
    """The region of `fn` over rows [r, width] and `params`, which start with those of `tensors_of(fn)`.

    Raises: CompileError.
    """
    names = [name for name, _ in (*fn.named_parameters(), *fn.named_buffers())] if isinstance(fn, nn.Module) else []

    def whole(y: Tensor, *given: Tensor) -> Tensor:
        if not isinstance(fn, nn.Module):
            return fn(y, *given)
        return torch.func.functional_call(fn, dict(zip(names, given, strict=False)), (y, *given[len(names) :]))

    try:
        text = region.record_rows(whole, width, dtype, params)
    except region.UnsupportedActivation as error:
        raise CompileError(
            f"what follows each expert cannot be compiled: {error}",
            hint="give every tensor that it reads as one of `tail_params`",
        ) from error
    if not _row_by_row(text, width, dtype, params):
        raise CompileError(
            "what follows each expert mixes rows, so that a token's result would depend on other tokens",
            hint="a norm over the last dimension does not; apply anything else to the sum of the experts",
        )
    return text


def _row_by_row(
    text: str, width: int, dtype: torch.dtype, params: Sequence[tuple[tuple[int, ...], torch.dtype]]
) -> bool:
    """Whether the rows of a region's result depend on their own row alone, tried on three."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        given = [torch.linspace(0.5, 1.5, prod(shape)).reshape(shape).to(kind) for shape, kind in params]
        rows = torch.linspace(-2, 3, 3 * width).sin().reshape(3, width).to(dtype)
        together = _run(text, rows, given)
        alone = [_run(text, rows[i : i + 1], given) for i in range(3)]
        return torch.allclose(together.float(), torch.cat(alone).float(), rtol=1e-2, atol=1e-3, equal_nan=True)


def _run(text: str, rows: Tensor, params: Sequence[Tensor]) -> Tensor:
    return experts_op.Rows(rows.shape[0]).run(region.decode(text), [rows, *params])[0]
