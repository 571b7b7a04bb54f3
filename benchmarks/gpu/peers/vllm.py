"""vLLM's fused experts on its Triton kernel: its own host code and configurations, without the rest of vLLM.

`fused_moe.py` imports much that it does not need here; empty modules stand for it. Its CUDA operators (align, sum) are
taken from `_moe_C*.so` where that is given and loads, else from `peers.kernels`; silu_and_mul is always from there.
"""

from __future__ import annotations

import enum
import importlib.util
import json
import logging
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures import one_line
from benchmarks.gpu.engines import Engine, Missing, Setting, narrow, without_gradients
from benchmarks.gpu.peers import folder_of

LAYER = "vllm.model_executor.layers.fused_moe"
OTHERS = {"NVIDIA_H100_80GB_HBM3": "NVIDIA_H200"}
"""Chips whose files are used where there is none for a shape."""


def engine(setting: Setting, tuned: bool) -> Engine:
    """Its own configuration file for this shape, or its default.

    Raises: Missing, for a tuned one where there is no file.
    """
    folder = folder_of(setting, "vllm")
    module, how = _load(folder)
    shape = setting.shape
    first, second = setting.module.gate_up_proj.detach(), setting.module.down_proj.detach()
    configs = tuned_configs(folder, shape.experts, shape.width, torch.cuda.get_device_name()) if tuned else None
    if tuned and configs is None:
        raise Missing(f"it has no configuration for E={shape.experts}, N={shape.width} on this chip")
    name, table = configs or ("default", None)

    def config(tokens: int) -> Any:
        return table[min(table, key=lambda count: abs(count - tokens))] if table else None

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        _OVERRIDE.config = config(len(x))
        return module.fused_experts_impl(x, first, second, weights, ids)

    return Engine(without_gradients(run), lambda tokens: f"{name}; {how}", prepare=narrow)


def tuned_configs(folder: Path, experts: int, width: int, chip: str) -> tuple[str, dict[int, Any]] | None:
    """The file's chip, and its configurations by number of tokens."""
    own = chip.replace(" ", "_")
    for device in (own, OTHERS.get(own)):
        path = folder / "configs" / f"E={experts},N={width},device_name={device}.json"
        if path.is_file():
            read = json.loads(path.read_text(encoding="utf-8"))
            return f"file of {device}", {int(count): entry for count, entry in read.items() if count.isdigit()}
    return None


class _Override:
    """The configuration that its code is told to use; None lets it choose its default."""

    config: Any = None


_OVERRIDE = _Override()


@cache
def _load(folder: Path) -> tuple[Any, str]:
    """Its module, and whose operators it calls."""
    path = folder / "fused_moe.py"
    if not path.is_file():
        raise Missing("DIR/vllm has no fused_moe.py")
    operators, how = _operators(folder)
    for name, attrs in stubs(operators).items():
        module = ModuleType(name)
        module.__dict__.update(attrs, __path__=[])
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    spec = importlib.util.spec_from_file_location(f"{LAYER}.fused_moe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    # No file is looked up by its own code: `engine` does, so that two configurations can be measured side by side.
    module.__dict__["get_moe_configs"] = lambda *args: None
    return module, how


def _operators(folder: Path) -> tuple[SimpleNamespace, str]:
    from benchmarks.gpu.peers import kernels

    why = "its align and sum by this benchmark's kernels"
    for library in sorted(folder.glob("_moe_C*.so")):
        try:
            torch.ops.load_library(str(library))
            found: Any = torch.ops._moe_C
            own = SimpleNamespace(align=found.moe_align_block_size, sum=partial(_summed, found.moe_sum))
            return own, "its own align and sum"
        except (OSError, RuntimeError, AttributeError) as error:
            why += f" ({one_line(error.__cause__ or error)})"
    return SimpleNamespace(align=None, sum=kernels.sum_of_slots), why


def _summed(operator: Any, parts: Tensor, out: Tensor) -> None:
    operator(parts, out, None, None)


def stubs(operators: SimpleNamespace) -> dict[str, dict[str, Any]]:
    """What stands for the modules that its file imports; parents first."""
    import triton
    import triton.language as tl

    from benchmarks.gpu.peers import kernels

    class MoEActivation(enum.Enum):
        SILU = "silu"

        @staticmethod
        def from_str(name: str) -> MoEActivation:
            return MoEActivation(name)

    def align(ids: Tensor, size: int, experts: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        most = ids.numel() + experts * (size - 1)
        if ids.numel() < experts:
            most = min(ids.numel() * size, most)
        rows, owners, total = (
            torch.empty(count, dtype=torch.int32, device=ids.device) for count in (most, -(-most // size), 1)
        )
        if operators.align is None:
            kernels.align(ids, experts, size, rows, owners, total)
        else:
            operators.align(ids, experts, size, rows, owners, total, None, None)
        return rows, owners, total

    def as_it_is(A: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return A, None

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def halved(width: int, _: object) -> int:
        return width // 2

    def logger(name: str) -> Any:
        made: Any = logging.getLogger(name)
        made.info_once = made.warning_once = nothing
        return made

    no: Callable[..., bool] = lambda *_: False  # noqa: E731
    platform = SimpleNamespace(
        is_rocm=no, is_xpu=no, is_cpu=no, is_cuda=lambda: True, fp8_dtype=lambda: torch.float8_e4m3fn,
        is_device_capability=lambda wanted: wanted == 90, is_cuda_alike=lambda: True,
    )  # fmt: skip
    experts = SimpleNamespace(adjust_N_for_activation=halved)
    return {
        "vllm": {},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False, "VLLM_TUNED_CONFIG_FOLDER": None, "VLLM_TRITON_USE_TD": None},
        "vllm._custom_ops": {"moe_sum": operators.sum},
        "vllm.logger": {"init_logger": logger},
        "vllm.platforms": {"current_platform": platform},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.triton_utils.allocation": {"set_triton_allocator": nothing},
        "vllm.utils": {},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.utils.platform_utils": {"get_device_name_as_file_name": lambda: "unknown"},
        "vllm.utils.torch_utils": {"direct_register_custom_op": nothing},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        LAYER: {"get_config": lambda: _OVERRIDE.config},
        f"{LAYER}.modular_kernel": {"FusedMoEExpertsModular": experts},
        f"{LAYER}.activation": {
            "MoEActivation": MoEActivation,
            "apply_moe_activation": lambda kind, out, wide: kernels.silu_and_mul(out, wide),
        },
        f"{LAYER}.config": {
            "FUSED_MOE_UNQUANTIZED_CONFIG": None,
            "FusedMoEQuantConfig": object,
            "_get_config_dtype_str": nothing,
        },
        f"{LAYER}.moe_align_block_size": {"moe_align_block_size": align},
        f"{LAYER}.utils": {
            "enable_swap_ab": no,
            "moe_kernel_quantize_input": as_it_is,
            "resolve_moe_use_td": no,
            "warn_if_moe_use_td_ineffective": nothing,
        },
    }
