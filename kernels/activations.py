"""Epilogues: pairs of an activation f(z) and its derivative f'(z), chosen by name.

They are named in the source of `activation`, not handed to kernels as functions: Triton's cache on disk knows functions
that stand in a tuple by their names only, and would go on with an old one.
"""

import triton
import triton.language as tl

from .elements import exact_sigmoid, fast_sigmoid


@triton.jit
def relu(z):
    # NaN stays NaN; before a conversion to a narrow type this is a modifier of it, and costs nothing.
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def leaky_relu(z):
    return tl.where(z < 0.0, z * 0.01, z)


@triton.jit
def leaky_relu_grad(z):
    # Not of numbers alone, which are fp32.
    return tl.where(z > 0.0, tl.full((), 1.0, z.dtype), tl.full((), 0.01, z.dtype))


@triton.jit
def sigmoid(z, dtype: tl.constexpr, F: tl.constexpr):
    """of which a dtype is made: of 16 bits an approximation will do"""
    return fast_sigmoid(z, F) if dtype.primitive_bitwidth == 16 and F.ACC == tl.float32 else exact_sigmoid(z, F)


@triton.jit
def sigmoid_grad(p):
    """of p = sigmoid(z)"""
    return p * (1.0 - p)


@triton.jit
def silu_grad(z, p):
    """of z and p = sigmoid(z)"""
    return (z - z * p) * p + p


@triton.jit
def tanh(z):
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    # Near 0 the quotient cancels; the series is good to 1e-15 there.
    q = z * z
    near = 1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 + q * (-1382 / 155925)))))
    return tl.where(q < 0.01, z * near, tl.where(z < 0.0, -far, far))


@triton.jit
def tanh_grad(z):
    t = tanh(z)
    return 1.0 - t * t


@triton.jit
def normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu(z):
    return z * normal_cdf(z)


@triton.jit
def gelu_grad(z):
    return normal_cdf(z) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def gelu_tanh(z):
    return 0.5 * z * (1.0 + tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))


@triton.jit
def gelu_tanh_grad(z):
    t = tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
    inner_grad = 0.7978845608028654 * (1.0 + 0.134145 * z * z)
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner_grad


@triton.jit
def hardswish(z):
    return z * tl.minimum(tl.maximum(z + 3.0, 0.0), 6.0) / 6.0


@triton.jit
def hardswish_grad(z):
    middle = z / 3.0 + 0.5
    return tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, middle, 1.0)).to(z.dtype)


@triton.jit
def activation(z, dtype: tl.constexpr, F: tl.constexpr):
    """f(z), which is stored as a dtype"""
    if F.ACT == "relu":
        z = relu(z)
    elif F.ACT == "leaky_relu":
        z = leaky_relu(z)
    elif F.ACT == "silu":
        z = z * sigmoid(z, dtype, F)
    elif F.ACT == "gelu":
        z = gelu(z)
    elif F.ACT == "gelu_tanh":
        z = gelu_tanh(z)
    elif F.ACT == "sigmoid":
        z = sigmoid(z, dtype, F)
    elif F.ACT == "tanh":
        z = tanh(z)
    elif F.ACT == "hardswish":
        z = hardswish(z)
    else:
        tl.static_assert(F.ACT == "identity")
    return z


@triton.jit
def activation_grad(z, dtype: tl.constexpr, F: tl.constexpr):
    """f'(z), which is multiplied by dy, a dtype; that of relu stands in elements.where_negative"""
    if F.ACT == "leaky_relu":
        z = leaky_relu_grad(z)
    elif F.ACT == "silu":
        z = silu_grad(z, sigmoid(z, dtype, F))
    elif F.ACT == "gelu":
        z = gelu_grad(z)
    elif F.ACT == "gelu_tanh":
        z = gelu_tanh_grad(z)
    elif F.ACT == "sigmoid":
        z = sigmoid_grad(sigmoid(z, dtype, F))
    elif F.ACT == "tanh":
        z = tanh_grad(z)
    else:
        tl.static_assert(F.ACT == "hardswish")
        z = hardswish_grad(z)
    return z
