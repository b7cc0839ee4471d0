"""Arithmetic to the last bit, and products at a precision."""

import triton
import triton.language as tl

# The interpreter truncates to bfloat16 and cannot multiply in it.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded; Triton's own division of float32 is not."""
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def square_root(x):
    """√x, correctly rounded."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x in another dtype, rounded to nearest even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def product(left, right, sums, PRECISION: tl.constexpr):
    """sums + left @ right: float64 as it is, float32 as three TF32 products, one, or one of bfloat16."""
    if left.dtype == tl.float64:
        sums = tl.dot(left, right, sums, out_dtype=tl.float64)
    elif PRECISION == "medium":
        left, right = narrow(left, tl.bfloat16), narrow(right, tl.bfloat16)
        if INTERPRETED:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums)
    else:
        sums = tl.dot(left, right, sums, input_precision="tf32" if PRECISION == "high" else "tf32x3")
    return sums
