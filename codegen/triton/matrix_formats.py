"""Device functions that widen packed weights for matrix instructions that read their first operand from registers.

A thread has the bytes of such an operand by twos. The forms are single operations on elements, views and loads: what
else there is between a load and a product, Triton 3.6 does in a layout of its own, and takes its result through shared
memory. As those of `formats.py`, their text is copied into the kernels, and none of them rounds.
"""
# pyright: basic, reportGeneralTypeIssues=false, reportAssignmentType=false
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined, no-untyped-call"
# ruff: noqa: ANN001, ANN201, SIM300

import triton
import triton.language as tl

from sparsec.codegen.triton.formats import from_fp8, from_mxfp4


@triton.jit
def matrix_from_fp8(q, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """`from_fp8` for the operands that a matrix instruction reads from registers, where a thread has bytes by twos."""
    if PTX and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 two, sign, by, zero;
            mov.b32 by, 0x7b807b80;
            mov.b32 zero, 0x80008000;
            cvt.u32.u16 two, $1;
            prmt.b32 two, 0, two, 0x5040;
            and.b32 sign, two, 0x80008000;
            shr.u32 two, two, 4;
            lop3.b32 two, two, 0x07f007f0, sign, 0xea;
            fma.rn.bf16x2 $0, two, by, zero;
            }""",
            "=r,h", [q], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return from_fp8(q, DTYPE, 0)


@triton.jit
def matrix_from_mxfp4(q, scales, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Blocks q [columns, 64] of 128 values in order, as DTYPE [columns, 128], times their scales, words [columns]."""
    q = tl.reshape(q, (q.shape[0], 2, 32))
    scales = tl.join(scales, scales >> 16)[:, :, None]
    if PTX and DTYPE == tl.bfloat16:
        low = lower_halves(q, (((scales & 255) + 126) << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True))
        high = upper_halves(q, ((((scales >> 8) & 255) + 126) << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True))
    else:
        low, high = from_mxfp4(q, scales, DTYPE, 0)
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), (q.shape[0], 128))


@triton.jit
def lower_halves(q, by):
    """The lower halves of bytes, which hold e2m1, as bf16, times 2^-126 by."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 two, bits, zero;
        mov.b32 zero, 0x80008000;
        cvt.u32.u16 two, $1;
        prmt.b32 two, 0, two, 0x5040;
        shr.u32 bits, two, 2;
        shl.b32 two, two, 4;
        and.b32 two, two, 0x80008000;
        lop3.b32 bits, bits, 0x01c001c0, two, 0xea;
        fma.rn.bf16x2 $0, bits, $2, zero;
        }""",
        "=r,h,r", [q, by], dtype=tl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def upper_halves(q, by):
    """The upper halves of bytes, as `lower_halves`."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 two, bits, zero;
        mov.b32 zero, 0x80008000;
        cvt.u32.u16 two, $1;
        prmt.b32 two, 0, two, 0x5040;
        shr.u32 bits, two, 6;
        and.b32 two, two, 0x80008000;
        lop3.b32 bits, bits, 0x01c001c0, two, 0xea;
        fma.rn.bf16x2 $0, bits, $2, zero;
        }""",
        "=r,h,r", [q, by], dtype=tl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip
