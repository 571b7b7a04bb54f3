"""A causal language model with its key/value cache inside, so that one program does prefill and decoding.

    lm = CausalLM(model, max_length=4096)
    captured = lm.capture()

The program takes `input_ids` [batch, s] for any s and `start` [1], the position of the first of them, and returns the
logits of the last position, [batch, 1, vocabulary]. Keys and values of all layers are buffers `cache.N.keys` and
`cache.N.values`, [batch, heads, max_length, dim]; each call returns their new contents as mutations. Prefill is a call
with the prompt and start 0, a decoding step is a call with one token and start = the number of tokens so far.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from transformers.cache_utils import Cache, CacheLayerMixin

from sparsec.diagnostics import CompileError
from sparsec.frontend import locations
from sparsec.frontend.capture import Captured, capture, for_capture

_EXAMPLE = 7  # tokens in the example call; any number that no model takes for something else


class UnsupportedCache(CompileError):
    """The model keeps more than keys and values between tokens: run it over the whole sequence for every token."""


class CausalLM(nn.Module):
    """`model` (a transformers causal language model) and static slots for its keys and values.

    Args:
        max_length: the number of positions that there are slots for.
        batch: sequences that run together; all have the same length.
        all_logits: return the logits of all positions given, [batch, s, vocabulary], not only of the last.

    Raises: UnsupportedCache for a model whose layers keep other states (linear attention, state spaces).
    """

    cache: nn.ModuleList
    _model: Any

    def __init__(self, model: Any, max_length: int, batch: int = 1, *, all_logits: bool = False) -> None:
        super().__init__()
        # The model's parts are this module's own, so that parameters keep the names that they have in the model.
        self.__dict__["_model"] = model
        self.training = model.training
        for name, part in (*model.named_children(), *model.named_parameters(recurse=False)):
            setattr(self, name, part)
        self.max_length, self.batch = max_length, batch
        self._few = {} if all_logits else _last_only(model)
        sliding = _sliding(model)
        slots = [
            _Slot(key, value, max_length, sliding[i] if i < len(sliding) else False)
            for i, (key, value) in enumerate(_states(model, batch))
        ]
        self.cache = nn.ModuleList(slots)

    def forward(self, input_ids: Tensor, start: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device) + start
        cache = Cache(layers=[_SlotLayer(slot, positions, start) for slot in self.cache])  # type: ignore[arg-type]
        rows = positions.unsqueeze(0).expand(input_ids.shape[0], -1)
        out = self._model(input_ids=input_ids, position_ids=rows, past_key_values=cache, use_cache=True, **self._few)
        return out.logits

    def capture(self) -> Captured:
        """The module and weights of this program. Raises: CompileError."""
        device = next(self.parameters()).device
        ids = torch.zeros(self.batch, _EXAMPLE, dtype=torch.int64, device=device)
        start = torch.zeros(1, dtype=torch.int64, device=device)
        shapes = {"input_ids": {1: Dim.DYNAMIC}, "start": None}
        captured = capture(self, (ids, start), dynamic=shapes, use_cache=True)
        for attrs in captured.module.main.arg_attrs.values():
            if str(attrs.get("source", "")).startswith("cache."):
                attrs["zeros"] = True  # whoever runs the program makes the slots
        return captured

    def reset(self) -> None:
        """Forget all tokens."""
        for slot in self.cache.children():
            for buffer in slot.buffers():
                buffer.zero_()


class _Slot(nn.Module):
    """Keys and values of one layer."""

    keys: Tensor
    values: Tensor

    def __init__(self, key: Tensor, value: Tensor, length: int, sliding: bool) -> None:
        super().__init__()
        self.sliding = sliding
        for name, state in (("keys", key), ("values", value)):
            batch, heads, _, dim = state.shape
            slots = torch.zeros(batch, heads, length, dim, dtype=state.dtype, device=state.device)
            self.register_buffer(name, slots, persistent=False)


class _SlotLayer(CacheLayerMixin):
    """One layer of the cache during one call. A sliding layer keeps all positions too: the mask hides the old ones."""

    def __init__(self, slot: _Slot, positions: Tensor, start: Tensor) -> None:
        super().__init__()
        self.slot, self.positions, self.start = slot, positions, start
        self.is_sliding = slot.sliding
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slots are there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.slot.keys.index_copy_(2, self.positions, key_states)
        self.slot.values.index_copy_(2, self.positions, value_states)
        return self.slot.keys, self.slot.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slot.keys.shape[2], 0

    def get_seq_length(self) -> Any:
        return self.start

    def get_max_length(self) -> int:
        return self.slot.keys.shape[2]


class _Probe(CacheLayerMixin):
    """Notes the shapes of what a layer wants to keep."""

    def __init__(self, is_sliding: bool) -> None:
        super().__init__()
        self.is_sliding = is_sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def _states(model: Any, batch: int) -> list[tuple[Tensor, Tensor]]:
    """An empty tensor like the key and the value of each layer, from a run of the model on fake tensors."""
    config = model.config.get_text_config(decoder=True)
    sliding = _sliding(model)
    layers: list[Any] = [_Probe(i < len(sliding) and sliding[i]) for i in range(config.num_hidden_layers)]
    device = next(model.parameters()).device
    with for_capture(model), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(batch, _EXAMPLE, dtype=torch.int64, device=device)
        problem = _problem(model, input_ids=ids, past_key_values=Cache(layers=layers), use_cache=True)
        if problem is not None and (own := _problem(model, input_ids=ids, use_cache=False)) is not None:
            raise CompileError(
                f"{type(model).__name__} cannot be run: {str(own).splitlines()[0]}", locations.of_exception(own)
            ) from own
    if (error := problem) is not None:
        raise UnsupportedCache(
            f"{type(model).__name__} keeps states that are no keys and values: {str(error).splitlines()[0]}",
            locations.of_exception(error),
            hint="it is run over the whole text for every token",
        ) from error
    kept = [(layer.keys, layer.values) for layer in layers]
    for i, (key, value) in enumerate(kept):
        if key is None or value is None or key.dim() != 4 or value.dim() != 4:
            raise UnsupportedCache(
                f"layer {i} of {type(model).__name__} keeps no keys and values of shape [batch, heads, positions, dim]",
                locations.of_class(type(model)),
                hint="it is run over the whole text for every token",
            )
    return [(_like(key), _like(value)) for key, value in kept]


def _problem(model: Any, **inputs: Any) -> Exception | None:
    """What a call of the model raises."""
    try:
        model(**inputs)
    except Exception as error:
        return error
    return None


def _like(state: Tensor) -> Tensor:
    batch, heads, _, dim = state.shape
    return torch.empty(batch, heads, 0, dim, dtype=state.dtype, device=state.device)


def _sliding(model: Any) -> list[bool]:
    """Which layers see a window of positions only, as transformers' own cache has it."""
    from transformers.cache_utils import DynamicCache

    return list(DynamicCache(config=model.config).is_sliding)


def _last_only(model: Any) -> dict[str, int]:
    parameters = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
