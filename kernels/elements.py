"""Elements cheaply: conversions and functions that NVIDIA's machines have an instruction for and Triton has not.

Each piece of inline assembly stands beside its plain twin, which the interpreter and other machines take.  The two
agree to the last bit where nothing else is said.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def least(a, b):
    """Of two constants: min() of Triton 3.5 makes a tensor of them."""
    return min(a, b)


@triton.jit
def add_pairs(a1, b1, a2, b2):
    return a1 + a2, b1 + b2


@triton.jit
def widen(v, F: tl.constexpr, PURE: tl.constexpr = True):
    """v in the accumulator's type: two bfloat16 of a register by a shift and an and, where Triton takes three.

    PURE: what was made of v before may be used again; else it is not kept in registers beside v for that.
    """
    PAIRS: tl.constexpr = F.PTX and F.ACC == tl.float32 and F.ACCESS > 1
    if PAIRS and v.dtype == tl.bfloat16:
        v = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [v],
            dtype=tl.float32, is_pure=PURE, pack=2,
        )  # fmt: skip
    elif PAIRS and v.dtype == tl.float16:
        v = tl.inline_asm_elementwise(
            "{ .reg .b16 p, q; mov.b32 {p, q}, $2; cvt.f32.f16 $0, p; cvt.f32.f16 $1, q; }", "=r,=r,r", [v],
            dtype=tl.float32, is_pure=PURE, pack=2,
        )  # fmt: skip
    else:
        v = v.to(F.ACC)
    return v


@triton.jit
def fast_sigmoid(z, F: tl.constexpr):
    """1 / (1 + exp(-z)) of fp32 by ex2 and rcp.

    By the errors that PTX's manual gives these, and that of z · log2(e), whose rounding is an error of the exponent, it
    is within 5e-7 + 2e-7 · |z| of its value: for every z that counts far below half a step of bf16 or fp16.
    """
    if F.PTX:
        s = tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;"
            " rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        s = 1.0 / (1.0 + tl.exp(-z))
    return s


@triton.jit
def exact_sigmoid(z, F: tl.constexpr):
    """1 / (1 + exp(-z)) of fp32 to six steps of it: what the rounding of z · log2(e) leaves out is made up for.

    Beyond ±88, where neither 1 + exp(-z) nor its distance from 1 can be told, as if at ±88.
    """
    if F.PTX and F.ACC == tl.float32:
        s = tl.inline_asm_elementwise(
            "{ .reg .f32 z, t, r; max.NaN.f32 z, $1, 0fC2B00000; min.NaN.f32 z, z, 0f42B00000;"
            " mul.rn.f32 t, z, 0fBFB8AA3B; neg.f32 z, z; fma.rn.f32 r, t, 0fBF317218, z; ex2.approx.ftz.f32 t, t;"
            " fma.rn.f32 t, t, r, t; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        # exp of a number that is not positive, so that nothing overflows.
        e = tl.exp(-tl.abs(z))
        s = tl.where(z < 0.0, e, 1.0) / (1.0 + e)
    return s


@triton.jit
def where_negative(z, e, F: tl.constexpr, PURE: tl.constexpr = True):
    """e, in the accumulator's type, where z < 0; else 0.  z is not -0; where it is NaN, either."""
    if F.PTX and e.dtype == tl.bfloat16 and F.ACC == tl.float32:
        # The signs of two z spread to a mask of a packed pair: PRMT and LOP3.
        g = tl.inline_asm_elementwise(
            "{ .reg .b32 m; prmt.b32 m, $3, $4, 0xffbb; and.b32 m, m, $2;"
            " shl.b32 $0, m, 16; and.b32 $1, m, 0xffff0000; }",
            "=r,=r,r,r,r", [e, z], dtype=tl.float32, is_pure=PURE, pack=2,
        )  # fmt: skip
    else:
        g = tl.where(z < 0.0, e.to(F.ACC), 0.0)
    return g
