"""A small kernel in C++, written by hand, with the ABI of generated ones: y[t] = x[t] * w in f32, and its team's size.

`order` asks how threads share rows: `ticket` hands out rows one at a time, `race` lets every thread write every row.
"""

from __future__ import annotations

from pathlib import Path
from string import Template

from sparsec.codegen.cpu import compiler
from sparsec.runtime.plan import Call, Kernel, Region, Step, Tensor, Variant

WIDTH = 8
MOST_TOKENS = 1000
"""The kernel refuses more."""

_TEMPLATE = Template(r"""
struct Job { const Call* call; int next_thread, next_row; };
static void body(void* data) {
  Job* job = (Job*)data;
  const Call* call = job->call;
  __atomic_fetch_add(&job->next_thread, 1, __ATOMIC_RELAXED);
  if (call->barrier) call->barrier();
  const float *x = (const float*)call->in[0], *w = (const float*)call->in[1], *b = (const float*)call->in[2];
  float *y = (float*)call->out[0], *row = (float*)call->scratch;
  for (;;) {
    const int64_t t = $next;
    if (t >= call->tokens) break;
    for (int i = 0; i < $width; ++i) row[t * $width + i] = x[t * $width + i] * w[i];
    for (int i = 0; i < $width; ++i) y[t * $width + i] = row[t * $width + i] + (b ? b[i] : 0) + $extra;
  }
}
SPARSEC_EXPORT int32_t sparsec_run(const Call* call) {
  if (call->tokens > $most) return 3;
  Job job = {call, 0, 0};
  if (call->threads > 1) call->parallel(body, &job, call->threads, 0);
  else body(&job);
  *(int32_t*)call->out[1] = job.next_thread;
  return 0;
}
SPARSEC_EXPORT int64_t sparsec_scratch(int64_t tokens, int32_t threads) { return $scratch; }
""")


def source(order: str = "ticket", scratch: str = f"tokens * {WIDTH} * 4", extra: str = "0") -> str:
    """The C++; `scratch` is the size it asks for, `extra` what it adds to every element."""
    call = Path(compiler.__file__).with_name("include") / "call.h"
    ticket = "__atomic_fetch_add(&job->next_row, 1, __ATOMIC_RELAXED)"
    nexts = {"ticket": ticket, "race": "job->next_row++"}
    text = _TEMPLATE.substitute(next=nexts[order], width=WIDTH, most=MOST_TOKENS, scratch=scratch, extra=extra)
    return call.read_text().replace("#pragma once", "") + text


def kernel(binaries: dict[str, str], tokens: int | str = "t", bias: bool = False) -> Kernel:
    """Its entry in a plan: operands x [t, 8], w [8], b [8] or none; results y [t, 8] and the team's size [1]."""
    wide, vector = Tensor((tokens, WIDTH), "f32"), Tensor((WIDTH,), "f32")
    # PyTorch in its place has no team.
    steps: list[Step] = [
        Call("aten.mul.Tensor", [{"slot": 0}, {"slot": 1}], {}, [2]),
        Call("aten.zeros.default", [[1]], {"dtype": {"dtype": "i32"}}, [3]),
    ]
    return Kernel(
        name="scaler",
        op="moe.route",
        backend="cpp",
        params=(wide, vector, vector if bias else None),
        results=(wide, Tensor((1,), "i32")),
        tokens=tokens,
        attrs={},
        regions={"body": Region((wide, vector), steps, [2, 3])},
        variants=[Variant(None, {})],
        binaries=binaries,
    )
