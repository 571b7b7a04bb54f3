"""Device functions that widen packed weights and round rows. As those of `tiles.py`, their text is copied into the
kernels.

Widening does not round: bf16 and f32 hold every value of e4m3 and of e2m1 times its scale. The bits of the narrow
float are put where the wide one has them, and a product by a power of two sets the exponent right, subnormals too.
"""
# pyright: basic, reportGeneralTypeIssues=false, reportAssignmentType=false
# mypy: disable-error-code="no-untyped-def, assignment, attr-defined, no-untyped-call"
# ruff: noqa: ANN001, ANN201, SIM300

import triton
import triton.language as tl


@triton.jit
def cut(x, DTYPE: tl.constexpr):
    """The f32 x in DTYPE, which holds its value."""
    if DTYPE == tl.bfloat16:
        return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def from_fp8(q, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """Bytes that hold e4m3 as DTYPE; PTX: whether the target is NVIDIA's, where four at a time are widened."""
    if PTX and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, sign, by, zero;
            mov.b32 by, 0x7b807b80;
            mov.b32 zero, 0x80008000;
            prmt.b32 low, 0, $2, 0x5040;
            prmt.b32 high, 0, $2, 0x7060;
            and.b32 sign, low, 0x80008000;
            shr.u32 low, low, 4;
            lop3.b32 low, low, 0x07f007f0, sign, 0xea;
            and.b32 sign, high, 0x80008000;
            shr.u32 high, high, 4;
            lop3.b32 high, high, 0x07f007f0, sign, 0xea;
            fma.rn.bf16x2 $0, low, by, zero;
            fma.rn.bf16x2 $1, high, by, zero;
            }""",
            "=r,=r,r", [q], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    elif PTX and DTYPE == tl.float32:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, sign, by, zero;
            mov.b32 by, 0x7b807b80;
            mov.b32 zero, 0x80008000;
            prmt.b32 low, 0, $4, 0x5040;
            prmt.b32 high, 0, $4, 0x7060;
            and.b32 sign, low, 0x80008000;
            shr.u32 low, low, 4;
            lop3.b32 low, low, 0x07f007f0, sign, 0xea;
            and.b32 sign, high, 0x80008000;
            shr.u32 high, high, 4;
            lop3.b32 high, high, 0x07f007f0, sign, 0xea;
            fma.rn.bf16x2 low, low, by, zero;
            fma.rn.bf16x2 high, high, by, zero;
            shl.b32 $0, low, 16;
            and.b32 $1, low, 0xffff0000;
            shl.b32 $2, high, 16;
            and.b32 $3, high, 0xffff0000;
            }""",
            "=r,=r,=r,=r,r", [q], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        w = q.to(tl.uint32)
        bits = ((w & 0x7F) << 20) | ((w & 0x80) << 24)
        return cut(bits.to(tl.float32, bitcast=True) * 1.329227995784916e36, DTYPE)  # 2^120


@triton.jit
def from_mxfp4(q, scales, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The lower and the upper halves of bytes q, which hold e2m1, as DTYPE, times their scales.

    `scales`, of a shape that is broadcast with q's, has that of the lower halves in bits 0 to 7, that of the upper ones
    in bits 8 to 15; they are exponents plus 127, at most 128. Four bytes that follow each other share them.
    """
    low = (scales & 255) + 126
    high = ((scales >> 8) & 255) + 126
    if PTX and DTYPE == tl.bfloat16:
        low = (low << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (high << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, sign, bits, zero;
            mov.b32 zero, 0x80008000;
            prmt.b32 a, 0, $4, 0x5040;
            prmt.b32 b, 0, $4, 0x7060;
            shr.u32 bits, a, 2;
            shl.b32 sign, a, 4;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 bits, bits, 0x01c001c0, sign, 0xea;
            fma.rn.bf16x2 $0, bits, $5, zero;
            shr.u32 bits, b, 2;
            shl.b32 sign, b, 4;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 bits, bits, 0x01c001c0, sign, 0xea;
            fma.rn.bf16x2 $1, bits, $6, zero;
            shr.u32 bits, a, 6;
            and.b32 sign, a, 0x80008000;
            lop3.b32 bits, bits, 0x01c001c0, sign, 0xea;
            fma.rn.bf16x2 $2, bits, $7, zero;
            shr.u32 bits, b, 6;
            and.b32 sign, b, 0x80008000;
            lop3.b32 bits, bits, 0x01c001c0, sign, 0xea;
            fma.rn.bf16x2 $3, bits, $8, zero;
            }""",
            "=r,=r,=r,=r,r,r,r,r,r", [q, low, high], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    elif PTX and DTYPE == tl.float32:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, sign, bits, by, zero;
            mov.b32 zero, 0x80008000;
            prmt.b32 a, 0, $8, 0x5040;
            prmt.b32 b, 0, $8, 0x7060;
            prmt.b32 by, $9, 0, 0x1010;
            shr.u32 bits, a, 2;
            shl.b32 sign, a, 4;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 bits, bits, 0x01c001c0, sign, 0xea;
            fma.rn.bf16x2 bits, bits, by, zero;
            shl.b32 $0, bits, 16;
            and.b32 $1, bits, 0xffff0000;
            shr.u32 bits, b, 2;
            shl.b32 sign, b, 4;
            and.b32 sign, sign, 0x80008000;
            lop3.b32 bits, bits, 0x01c001c0, sign, 0xea;
            fma.rn.bf16x2 bits, bits, by, zero;
            shl.b32 $2, bits, 16;
            and.b32 $3, bits, 0xffff0000;
            prmt.b32 by, $13, 0, 0x1010;
            shr.u32 bits, a, 6;
            and.b32 sign, a, 0x80008000;
            lop3.b32 bits, bits, 0x01c001c0, sign, 0xea;
            fma.rn.bf16x2 bits, bits, by, zero;
            shl.b32 $4, bits, 16;
            and.b32 $5, bits, 0xffff0000;
            shr.u32 bits, b, 6;
            and.b32 sign, b, 0x80008000;
            lop3.b32 bits, bits, 0x01c001c0, sign, 0xea;
            fma.rn.bf16x2 bits, bits, by, zero;
            shl.b32 $6, bits, 16;
            and.b32 $7, bits, 0xffff0000;
            }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r,r", [q, low << 7, high << 7], dtype=(tl.float32, tl.float32),
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        w = q.to(tl.uint32)
        first = (((w & 7) << 22) | ((w & 8) << 28)).to(tl.float32, bitcast=True)
        second = (((w & 0x70) << 18) | ((w & 0x80) << 24)).to(tl.float32, bitcast=True)
        low = (low << 23).to(tl.float32, bitcast=True)
        high = (high << 23).to(tl.float32, bitcast=True)
        return cut(first * low, DTYPE), cut(second * high, DTYPE)


@triton.jit
def to_fp8(x, BEYOND: tl.constexpr):
    """The f32 x [rows, groups, 128] as bytes of e4m3, each group over a power of two, and these scales [rows, groups].

    Integers throughout, but for a product by a power of two and a sum that rounds what is below 2^-6, where e4m3 has
    steps of 2^-9. A scale is the least power of two that its group's largest is at most 448 times, 1.75 * 2^8, and NaN
    where the largest's bits are BEYOND or more, as those of NaN are.
    """
    signed = x.to(tl.int32, bitcast=True)
    largest = tl.max(signed & 0x7FFFFFFF, axis=2)
    exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)
    scale = tl.where(largest < BEYOND, (exponent << 23).to(tl.float32, bitcast=True), float("nan"))
    by = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    size = tl.abs(x) * tl.expand_dims(by, 2)
    bits = size.to(tl.int32, bitcast=True)
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    even = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    return (tl.where(bits < 0x3C800000, small, even) | ((signed >> 24) & 0x80)).to(tl.uint8), scale


@triton.jit
def as_e4m3(pointer, E4M3: tl.constexpr):
    """A pointer to bytes as one to what they hold, where the target multiplies e4m3."""
    if E4M3:
        return pointer.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
    else:
        return pointer


@triton.jit
def dot_e4m3(a, b, E4M3: tl.constexpr):
    """The product of e4m3 by e4m3, or of bytes that hold it, as f16 does too.

    Tensor cores of an H100 keep fewer bits of such sums than f32 has: no more than 128 terms are added there.
    """
    if E4M3:
        return tl.dot(a, b)
    else:
        return tl.dot(from_fp8(a, tl.float16, False), from_fp8(b, tl.float16, False))
