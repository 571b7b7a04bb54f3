"""Published measurements of expert parallelism, which the simulator is held against. Nothing here is ours.

All are of DeepSeek-V3's shape: hidden size 7168, expert width 2048, top 8 of 256 experts.
"""

from __future__ import annotations

from dataclasses import dataclass

DEEPEP_V1 = "github.com/deepseek-ai/DeepEP, docs/legacy.md"
DEEPEP_V2 = "github.com/deepseek-ai/DeepEP, README.md"
TRTLLM = "TensorRT-LLM, tech blog 4 (Scaling Expert Parallelism, part 1)"
LMSYS = "LMSYS, Deploying DeepSeek with PD disaggregation and large-scale EP on 96 H100 (2025-05-05)"
DAY6 = "DeepSeek, open-infra-index, day 6: DeepSeek-V3/R1 inference system overview"


@dataclass(frozen=True)
class Exchange:
    """Dispatch and combine of one configuration, fp8 out and bf16 back.

    Args:
        point: number of the validation point of the dispatch; the combine's is `back`.
        tokens: of each rank.
        nvlink, net: bytes/s of the links' data sheets.
        unit: `us`, or GB/s of all rows sent, those to the own node (`net`) or rank (`nvlink`) included.
        top_groups: nodes that a token's experts are on at most; 0: any.
        dispatch, combine: as published.
    """

    point: int
    back: int
    what: str
    ranks: int
    tokens: int
    nvlink: float
    net: float
    unit: str
    dispatch: float
    combine: float
    source: str
    top_groups: int = 0


def _low_latency(ranks: int, dispatch: float, combine: float) -> Exchange:
    return Exchange(1, 2, "H800, low latency", ranks, 128, 160e9, 50e9, "us", dispatch, combine, DEEPEP_V1)


def _normal(ranks: int, unit: str, dispatch: float, combine: float, top_groups: int = 0) -> Exchange:
    what = "H800, normal"
    return Exchange(3, 3, what, ranks, 4096, 160e9, 50e9, unit, dispatch, combine, DEEPEP_V1, top_groups)


def _second(what: str, ranks: int, nvlink: float, unit: str, dispatch: float, combine: float) -> Exchange:
    return Exchange(4, 4, what, ranks, 8192, nvlink, 50e9, unit, dispatch, combine, DEEPEP_V2)


EXCHANGES = (
    _low_latency(8, 77, 114),
    _low_latency(16, 118, 195),
    _low_latency(32, 155, 273),
    _low_latency(64, 173, 314),
    _low_latency(128, 192, 369),
    _low_latency(256, 194, 360),
    _normal(8, "nvlink", 153, 158),
    _normal(16, "net", 43, 43),
    _normal(32, "net", 58, 57),
    _normal(64, "net", 51, 50, top_groups=4),
    # The SM90's NVLink is not named; at 160 GB/s it would limit EP 8 x 2 to half of this, so it is taken as an H100's.
    _second("SM90, V2", 16, 450e9, "net", 90, 81),
    _second("SM90, V2", 32, 450e9, "net", 61, 61),
    _second("SM100, V2", 16, 900e9, "net", 90, 91),
    _second("SM100, V2", 8, 900e9, "nvlink", 726, 740),
)

TOLERANCE = {1: 0.05, 2: 0.10, 3: 0.10, 4: 0.10}
"""Of relative errors, by validation point."""


@dataclass(frozen=True)
class Imbalance:
    """Rows of the fullest rank over the mean, less 1, for 1,024 rows a rank on average (point 5).

    Args:
        slots: per rank; 0: experts in order, without replicas.
        excess: as published.
        tolerance: relative where nobody planned (another dataset), else absolute.
    """

    what: str
    ranks: int
    slots: int
    excess: float
    tolerance: float
    source: str = TRTLLM


IMBALANCES = (
    Imbalance("EP32, experts in order", 32, 0, 1.564, 0.2),
    Imbalance("EP32, 288 slots", 32, 9, 0.109, 0.02),
    Imbalance("EP36, 288 slots", 36, 8, 0.115, 0.02),
)
ROWS_A_RANK = 1024
DEVIATION = 52.0
"""Rows: the standard deviation over the ranks of EP32 with 288 slots."""


@dataclass(frozen=True)
class Whole:
    """A whole deployment (points 6 to 8).

    Args:
        unit: `speed-up` of EPLB over experts in order, or tokens/s of a node of 8.
    """

    point: int
    what: str
    unit: str
    value: float
    tolerance: float
    source: str


WHOLES = (
    Whole(6, "prefill, EP32, EPLB over none", "speed-up", 1.49, 0.10, LMSYS),
    Whole(6, "decode, EP72, EPLB over none", "speed-up", 2.54, 0.10, LMSYS),
    Whole(7, "H100, prefill, EP32, 2,000-token inputs", "tokens/s a node", 52_300, 0.15, LMSYS),
    Whole(7, "H100, decode, EP72, 2,000-token inputs", "tokens/s a node", 22_300, 0.15, LMSYS),
    Whole(8, "H800, prefill, EP32, uncached part of 73.7k", "tokens/s a node", 32_200, 0.15, DAY6),
    Whole(8, "H800, decode, EP144", "tokens/s a node", 14_800, 0.15, DAY6),
)
