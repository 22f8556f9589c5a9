r"""GELU and its derivative on blocks of float32, cheap enough for the end of a product.

    gelu(x) = x Phi(x) = max(x, 0) - |x| tail,    tail = Phi(-|x|) = exp(-x^2 / 2) Q(|x|)
    gelu'(x) = Phi(x) + x phi(x),                 phi(x) = exp(-x^2 / 2) / sqrt(2 pi)

Q(a) = erfcx(a / sqrt(2)) / 2 is smooth and falls like 1 / a, so a polynomial in t = (1 + p a)^-1/2 or (1 + p a)^-1
follows it to the end of float32: the error is relative everywhere, where 1 + erf(x) loses all digits below -5. One
exponential serves value and derivative. Polynomials: minimax for the relative error on [0, 14], by Lawson's iteration.

For 16-bit results: degree 5 in (1 + p a)^-1/2, within 7.1e-5; half a unit in the last place is 2.4e-4 in float16. An
rsqrt is one instruction, where a division by `1 + p a` is eight: 13 instructions an element on sm_90, with erf 40.
For float32 results: degree 8 in 1 / (1 + p a), whose coefficients are all small, within 3.7e-8.

The tanh form is x sigmoid(2 v), v = sqrt(2 / pi) (x + 0.044715 x^3), and has sigmoid(z) = rsqrt(1 + exp(-z))^2.
Hendrycks, Gimpel 2016, https://arxiv.org/abs/1606.08415. Errors: `python -m bench gelu`, bench/results/gelu.md.
"""

from fastbert.kernels._triton import tl, triton

NEG_HALF_LOG2_E = tl.constexpr(-0.7213475204444817)  # exp(-x^2 / 2) = 2^(x^2 * this)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
NEG_TWO_V = tl.constexpr(-2.302208198144325)  # exp(-2 v) = 2^((x + 0.044715 x^3) * this)
TWO_DV = tl.constexpr(1.5957691216057308)  # the slope of 2 v at 0
CUBE = tl.constexpr(0.044715)


@triton.jit
def gelu(x, APPROXIMATE: tl.constexpr, WIDE: tl.constexpr):
    """gelu(x), of float32.

    Args:
        APPROXIMATE: "none" or "tanh".
        WIDE: whether the result is kept in float32.
    """
    if APPROXIMATE == "tanh":
        sigmoid, _ = _sigmoid(x, WIDE)
        return x * sigmoid
    tail, _ = _tail(x, WIDE)
    return tl.maximum(x, 0.0) - tl.abs(x) * tail


@triton.jit
def gelu_and_slope(x, APPROXIMATE: tl.constexpr, WIDE: tl.constexpr):
    """gelu(x) and gelu'(x)."""
    if APPROXIMATE == "tanh":
        s, z = _sigmoid(x, WIDE)
        return x * s, s + x * s * (1.0 - s) * ((z * z * CUBE * 3.0 + 1.0) * TWO_DV)
    tail, e = _tail(x, WIDE)
    return tl.maximum(x, 0.0) - tl.abs(x) * tail, tl.where(x < 0, tail, 1.0 - tail) + x * (e * INV_SQRT_2PI)


@triton.jit
def _sigmoid(x, WIDE: tl.constexpr):
    """sigmoid(2 v), and x within the bounds where that changes."""
    z = tl.minimum(tl.maximum(x, -30.0), 30.0)  # beyond it is 0 or 1, and its cube could be infinite
    e = tl.exp2((z * z * CUBE + 1.0) * z * NEG_TWO_V)
    if WIDE:
        return 1.0 / (1.0 + e), z
    root = tl.rsqrt(1.0 + e)
    return root * root, z


@triton.jit
def _tail(x, WIDE: tl.constexpr):
    """Phi(-|x|) and exp(-x^2 / 2)."""
    a = tl.abs(x)
    e = tl.exp2(x * x * NEG_HALF_LOG2_E)
    if WIDE:
        t = 1.0 / (1.0 + 0.228 * a)
        q = -0.08457308871 * t + 0.3269234518
        q = q * t - 0.3424454075
        q = q * t + 0.3641198872
        q = q * t - 0.07030313218
        q = q * t + 0.1324638624
        q = q * t + 0.08189627844
        q = q * t + 0.09196666601
        q = q * t - 4.851590073e-05
    else:
        t = tl.rsqrt(1.0 + 0.56 * a)
        q = -0.9506180242 * t + 2.66141383
        q = q * t - 2.233303159
        q = q * t + 1.22587405
        q = q * t - 0.2231350535
        q = q * t + 0.0197346147
    return e * q, e
