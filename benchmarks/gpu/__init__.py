"""How fast expert layers run on this GPU, beside other engines: `python -m benchmarks.gpu --minutes 8 --peers DIR`.

What is measured: one expert layer in bf16, from rows, experts' numbers and weights to rows; the router is left out on
every side, sorting by expert is in. Each engine is first compared with f64 on given routings, with every buffer that it
asks for full of NaN, and is not timed where it is wrong. Times are those of CUDA graphs that hold a few layers with
other inputs each, the L2 cache filled in between by reading something else, engines in turn as A B B A. The roofs (a
copy, and a bf16 matmul of 8192 cubed) are measured in the same run.

What is needed: torch 2.11, triton 3.6 and transformers 5.17 or later; no network, no compiler, not the parser of the
IR. `--peers DIR` adds engines whose files lie in DIR (`python -m benchmarks.gpu.gather DIR WHEEL...` puts them there):

    DIR/vllm/fused_moe.py           of vllm/model_executor/layers/fused_moe, with configs/*.json beside it
    DIR/vllm/_moe_C*.so             optional; without it its align and sum are Triton kernels of this benchmark
    DIR/triton_kernels/             of vllm/third_party
    DIR/liger_kernel/               of the wheel
    DIR/scattermoe/                 of its repository (shawntan/scattermoe, 0.3)

The first minutes on a new GPU machine, one line each:

    python -m pytest -q -n 12 -m gpu tests/codegen/triton/test_{gpu,bank_operator}.py tests/benchmarks/test_gpu.py
    python -m pytest -q -n 12 -m "slow or not slow" -o python_files="check_*.py" tests/codegen/triton
    python -m benchmarks.gpu --minutes 8 --peers DIR --ahead FOLDER         # the table
    python -m benchmarks.gpu.variants --minutes 3                           # the cost model against what was measured
    python -m benchmarks.gpu --readme                                       # the table into the README

The first two say in a few minutes what is wrong with which kernel; those that read texts of the IR need lark.

`python -m benchmarks.gpu --ahead FOLDER --compile-only cuda:sm_90` compiles every layer of the benchmark beforehand, on
a machine without a GPU; the same `--ahead FOLDER` then finds the kernels there. `--rehearse` runs the whole program in
seconds on tiny layers on a CPU; its figures mean nothing.
"""
