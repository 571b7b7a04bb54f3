"""How fast the IR is read, written, checked and dumped: `python -m benchmarks.ir [--ops 5000] [--repeats 9] [--json]`.

The module is a stack of expert layers (routing, experts, norms, residuals), each op with its own location, as capture
leaves them. Times are process CPU time in milliseconds: the median of the repeats, and their spread. What inspection
costs is given as a share of the passes alone, in which neither capture nor the kernels' compilers count: `off` is what
is kept of each phase without a dump (for `compiled.ir(PHASE)`), `on` what a dump takes in addition, its page included.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from sparsec import dialects, pipeline
from sparsec.inspect.dump import Dump
from sparsec.ir.core import Module
from sparsec.ir.equal import clone_module, equal
from sparsec.ir.mlir import print_generic
from sparsec.ir.parser import parse_module
from sparsec.ir.printer import print_module
from sparsec.ir.verify import verify_module

assert dialects.__all__  # importing them registers the ops
TARGETS = {"parse": 600.0, "print": 60.0, "verify": 30.0}  #: milliseconds for 5,000 ops
SHARES = {"off": 0.1, "on": 0.5}  #: of the passes, what inspection may cost

_LAYER = """
  loc "models/small.py":20 in "model.layers.{i}.norm"  // variance = x.pow(2).mean(-1, keepdim=True)
  %square.{i} = aten.pow.Tensor_Scalar(%x.{i}) {{exponent = 2}} : tensor<s0x64xf32>
  %variance.{i} = aten.mean.dim(%square.{i}) {{dim = [-1], keepdim = true}} : tensor<s0x1xf32>
  loc "models/small.py":21 in "model.layers.{i}.norm"  // x = x * torch.rsqrt(variance + self.eps)
  %shifted.{i} = aten.add.Scalar(%variance.{i}) {{other = 1.0e-06}} : tensor<s0x1xf32>
  %rsqrt.{i} = aten.rsqrt(%shifted.{i}) : tensor<s0x1xf32>
  %normed.{i} = aten.mul.Tensor(%x.{i}, %rsqrt.{i}) : tensor<s0x64xf32>
  loc "models/small.py":34 in "model.layers.{i}.mlp.gate"  // logits = F.linear(x, self.weight)
  %logits.{i} = aten.linear(%normed.{i}, %gate) : tensor<s0x8xf32>
  loc "models/small.py":35 in "model.layers.{i}.mlp.gate" fused [36]
  %ids.{i}, %weights.{i} = moe.route(%logits.{i}) : tensor<s0x2xi64>, tensor<s0x2xf32> {{
    body(%z: tensor<s0x8xf32>):
      loc "models/small.py":35 in "model.layers.{i}.mlp.gate"  // probs = logits.softmax(-1)
      %p = aten.softmax.int(%z) {{dim = -1}} : tensor<s0x8xf32>
      loc "models/small.py":36 in "model.layers.{i}.mlp.gate"  // weights, ids = probs.topk(2)
      %w, %e = aten.topk(%p) {{k = 2}} : tensor<s0x2xf32>, tensor<s0x2xi64>
      yield %e, %w
  }}
  loc "models/small.py":50 in "model.layers.{i}.mlp.experts"  // return self.experts(x, ids, weights)
  %y.{i} = moe.experts(%normed.{i}, %ids.{i}, %weights.{i}, %up, %down) : tensor<s0x64xf32> {{
    activation(%a: tensor<rx48xf32>, %b: tensor<rx48xf32>):
      %g = aten.silu(%a) : tensor<rx48xf32>
      %h = aten.mul.Tensor(%g, %b) : tensor<rx48xf32>
      yield %h
  }}
  loc "models/small.py":60 in "model.layers.{i}"  // return residual + x
  %x.{j} = aten.add.Tensor(%x.{i}, %y.{i}) : tensor<s0x64xf32>"""


def model_text(ops: int) -> str:
    """A module of about `ops` ops in the short form (15 a layer, those in regions included)."""
    layers = max(1, round(ops / 15))
    args = (
        '  %x.0: tensor<s0x64xf32> {kind = "input"},\n'
        '  %gate: tensor<8x64xf32> {kind = "param", source = "gate"},\n'
        '  %up: tensor<8x96x64xf32> {kind = "param", source = "up"},\n'
        '  %down: tensor<8x64x48xf32> {kind = "param", source = "down"}'
    )
    body = "".join(_LAYER.format(i=i, j=i + 1) for i in range(layers))
    head = f'func @main(\n{args}\n) -> (tensor<s0x64xf32> {{kind = "output"}}) {{'
    return f'module {{phase = "capture", version = 1}}\n\n{head}{body}\n  return %x.{layers}\n}}\n'


def measure(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Milliseconds of CPU time: median, least and most of `repeats` runs, after one that is not counted."""
    run()
    times = list[float]()
    for _ in range(repeats):
        gc.collect()
        start = time.process_time()
        run()
        times.append((time.process_time() - start) * 1e3)
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def benchmark(ops: int = 5000, repeats: int = 9) -> dict[str, Any]:
    """The measurements, with the size of what was measured."""
    text = model_text(ops)
    module = parse_module(text)
    verify_module(module)
    generic = print_generic(module)
    if print_module(module) != text or not equal(parse_module(generic), module):
        raise RuntimeError("the benchmark's module does not survive a round trip")
    runs: dict[str, Callable[[], Any]] = {
        "parse": lambda: parse_module(text),
        "print": lambda: print_module(module),
        "verify": lambda: verify_module(module),
        "parse generic": lambda: parse_module(generic),
        "print generic": lambda: print_generic(module),
    }
    times = {name: measure(run, repeats) for name, run in runs.items()}
    dumps = {target: dump_cost(module, target, repeats) for target in ("cpu", "cuda:sm_90")}
    ops = sum(1 for _ in module.walk())
    return {"ops": ops, "bytes": len(text), "repeats": repeats, "ms": times, "dump": dumps}


def dump_cost(module: Module, target: str, repeats: int) -> dict[str, float]:
    """CPU milliseconds of all passes, of the copies that are kept, and of a dump; medians, alternating."""

    def run(instruments: list[pipeline.Instrument]) -> float:
        copy = clone_module(module)
        gc.collect()
        start = time.process_time()
        pipeline.run(copy, target=target, instruments=instruments)
        return (time.process_time() - start) * 1e3

    def copied(module: Module) -> Module:
        start = time.process_time()
        copy = clone_module(module)
        spent[-1] += (time.process_time() - start) * 1e3
        return copy

    plain, dumped, spent = list[float](), list[float](), list[float]()
    for _ in range(repeats):
        spent.append(0.0)
        with mock.patch.object(pipeline, "clone_module", copied):
            plain.append(run([]))
        with tempfile.TemporaryDirectory() as folder:
            dumped.append(run([Dump(folder)]))
    passes, copies = statistics.median(plain), statistics.median(spent)
    return {"passes": passes - copies, "copies": copies, "dump": statistics.median(dumped) - passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--ops", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    result = benchmark(options.ops, options.repeats)
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['ops']} ops, {result['bytes'] // 1000} kB of text, {result['repeats']} repeats, CPU ms")
    for name, ms in result["ms"].items():
        target = f"   target {TARGETS[name]:.0f}" if name in TARGETS else ""
        print(f"{name:>14}  {ms['median']:7.1f}  ({ms['min']:.1f} - {ms['max']:.1f}){target}")
    for name, ms in result["dump"].items():
        shares = {"off": ms["copies"] / ms["passes"], "on": ms["dump"] / ms["passes"]}
        said = ", ".join(f"{what} {share:.0%} (target {SHARES[what]:.0%})" for what, share in shares.items())
        print(f"{'passes':>14}  {ms['passes']:7.1f}  for {name}; inspection {said}")


if __name__ == "__main__":
    main()
