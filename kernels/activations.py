"""Epilogues: pairs of an activation f(z) and its derivative f'(z), chosen by name on the host."""

import triton
import triton.language as tl


@triton.jit
def identity(z):
    return z


@triton.jit
def identity_grad(z):
    return z * 0.0 + 1.0


@triton.jit
def relu(z):
    # Not maximum(z, 0): that would turn NaN into 0.
    return tl.where(z < 0.0, 0.0, z)


@triton.jit
def relu_grad(z):
    return tl.where(z > 0.0, 1.0, 0.0).to(z.dtype)


@triton.jit
def leaky_relu(z):
    return tl.where(z < 0.0, z * 0.01, z)


@triton.jit
def leaky_relu_grad(z):
    return tl.where(z > 0.0, 1.0, z * 0.0 + 0.01)


@triton.jit
def sigmoid(z):
    # exp of a non-positive number only, so that nothing overflows.
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0.0, e, z * 0.0 + 1.0) / (1.0 + e)


@triton.jit
def sigmoid_grad(z):
    p = sigmoid(z)
    return p * (1.0 - p)


@triton.jit
def silu(z):
    return z * sigmoid(z)


@triton.jit
def silu_grad(z):
    p = sigmoid(z)
    return p * (1.0 + z * (1.0 - p))


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


ACTIVATIONS = {
    "identity": (identity, identity_grad),
    "relu": (relu, relu_grad),
    "leaky_relu": (leaky_relu, leaky_relu_grad),
    "silu": (silu, silu_grad),
    "gelu": (gelu, gelu_grad),
    "gelu_tanh": (gelu_tanh, gelu_tanh_grad),
    "sigmoid": (sigmoid, sigmoid_grad),
    "tanh": (tanh, tanh_grad),
    "hardswish": (hardswish, hardswish_grad),
}
