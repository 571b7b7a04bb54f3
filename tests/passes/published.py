"""What is published of expert layers on an H100 SXM, bf16, uniform routing: what the cost model is held to."""

from __future__ import annotations

from dataclasses import dataclass

from sparsec.ir.types import DType
from sparsec.passes.variants import Gemm


@dataclass(frozen=True)
class Shape:
    """A gated expert layer."""

    experts: int
    k: int
    hidden: int
    width: int

    def layer(self, dtype: DType = DType.bf16, packing: str = "plain", activations: str = "model") -> tuple[Gemm, Gemm]:
        """Both its GEMMs."""
        e, k, h, i = self.experts, self.k, self.hidden, self.width
        up = Gemm("up", e, k, h, i, 2, dtype, 0, packing, activations=activations)
        return up, Gemm("down", e, k, i, h, 1, dtype, 1, packing, activations=activations)

    def flops(self, tokens: int) -> float:
        return 6.0 * tokens * self.k * self.hidden * self.width


MIXTRAL = Shape(8, 2, 4096, 14336)
MIXTRAL_HALF = Shape(8, 2, 4096, 7168)
QWEN3 = Shape(128, 8, 2048, 768)
OLMOE = Shape(64, 8, 2048, 1024)
GPT_OSS = Shape(128, 4, 2880, 2880)
DEEPSEEK_V3 = Shape(256, 8, 7168, 2048)

# Whole layers, tokens -> microseconds.
LAYERS = {
    # Liger-Kernel PR 1294, inference.
    QWEN3: {128: 440, 1024: 501, 8192: 1398, 32768: 5170},
    # vLLM's Triton kernels: PR 24700 and PR 39902.
    MIXTRAL_HALF: {1: 144, 64: 483, 1024: 834, 1536: 1123},
    GPT_OSS: {1: 85, 1024: 2314},
}

# SGLang PR 36543, the GEMMs of QWEN3 alone for 5034 tokens, by pointers and by TMA.
SGLANG = {"tokens": 5034, "up": 625.6, "down": 316.5, "up_tma": 530.6, "down_tma": 283.4}

# SonicMoE (arXiv 2512.14080), read off its chart: tokens, layer -> TFLOP/s. CuTe kernels, not Triton.
SONIC = {
    (32768, Shape(256, 16, 4096, 256)): 428,
    (32768, Shape(128, 8, 4096, 512)): 503,
    (32768, Shape(64, 4, 4096, 1024)): 552,
    (24576, Shape(128, 8, 1536, 256)): 367,
    (24576, Shape(64, 4, 1536, 512)): 435,
    (24576, Shape(32, 2, 1536, 1024)): 467,
}

# The same of its backward, for gated layers of twice the width.
SONIC_BACKWARD = {
    (24576, Shape(128, 8, 1536, 256)): 407,
    (24576, Shape(64, 4, 1536, 512)): 440,
    (24576, Shape(32, 2, 1536, 1024)): 468,
    (32768, Shape(256, 16, 4096, 512)): 527,
    (32768, Shape(128, 8, 4096, 1024)): 568,
    (32768, Shape(64, 4, 4096, 2048)): 586,
}
