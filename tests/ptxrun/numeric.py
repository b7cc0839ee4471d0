"""Rounding-exact helpers: bf16, tf32, fused multiply-add, directed rounding."""

from __future__ import annotations
import numpy as np

f16, f32, f64 = np.float16, np.float32, np.float64
u16, u32, u64 = np.uint16, np.uint32, np.uint64
i32, i64 = np.int32, np.int64
_M29 = i64(0x1FFFFFFF)
_MID = i64(0x10000000)


def bf_to_f32(h):
    return (h.astype(u32) << u32(16)).view(f32)


def f32_to_bf(x):
    """Round to nearest even; NaN becomes 0x7fff (as cvt.rn.bf16.f32 gives)."""
    b = x.view(u32)
    r = ((b + (u32(0x7FFF) + ((b >> u32(16)) & u32(1)))) >> u32(16)).astype(u16)
    nan = x != x
    if nan.any():
        r[nan] = 0x7FFF
    return r


def f64_to_f32_odd(x):
    """f64 -> f32 rounded to odd (so that a later rounding is correct)."""
    y = x.astype(f32)
    b = y.view(u32).copy()
    yd = y.astype(f64)
    ne = (yd != x) & (x == x)
    if ne.any():
        dec = ne & (np.abs(yd) > np.abs(x))
        b[dec] -= u32(1)
        b[ne] |= u32(1)
    return b.view(f32)


def two_sum(a, b):
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def odd(s, e):
    """Given s + e exact with s = fl(s+e): the f64 rounded to odd."""
    fix = (e != 0) & np.isfinite(s) & np.isfinite(e)
    if fix.any():
        b = s.view(i64).copy()
        dec = fix & (np.signbit(e) != np.signbit(s))
        b[dec] -= 1
        b[fix] |= 1
        return b.view(f64)
    return s


def fma32(a, b, c):
    """Correctly rounded f32 fused multiply-add."""
    p = np.multiply(a, b, dtype=f64)
    s = p + c
    if np.count_nonzero((s.view(i64) & _M29) == _MID):
        s = odd(*two_sum(p, np.broadcast_to(c, p.shape).astype(f64)))
        return f64_to_f32_odd_then_near(s)
    return s.astype(f32)


def f64_to_f32_odd_then_near(s):
    return s.astype(f32)


def fma_odd64(a, b, c):
    """a*b+c for operands of at most 24 bits, as an f64 rounded to odd."""
    p = a.astype(f64) * b.astype(f64)
    return odd(*two_sum(p, np.broadcast_to(c, p.shape).astype(f64)))


_SPLIT = f64(134217729.0)


def two_prod(a, b):
    p = a * b
    t = _SPLIT * a
    ah = t - (t - a)
    al = a - ah
    t = _SPLIT * b
    bh = t - (t - b)
    bl = b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def fma64(a, b, c):
    """f64 fma after Boldo & Melquiond; falls back to a*b+c where the splitting overflows."""
    a, b, c = np.broadcast_arrays(a, b, c)
    uh, ul = two_prod(a, b)
    th, tl = two_sum(c, ul)
    vh, vl = two_sum(uh, th)
    z = odd(*two_sum(tl, vl))
    r = vh + z
    bad = ~np.isfinite(r) | ~np.isfinite(ul)
    if bad.any():
        r = np.where(bad, a * b + c, r)
    return r


def flush32(x):
    b = x.view(u32)
    return np.where((b & u32(0x7F800000)) == 0, b & u32(0x80000000), b).view(f32)


def sat(x):
    y = np.minimum(np.maximum(x, x.dtype.type(0)), x.dtype.type(1)) + x.dtype.type(0)
    return np.where(x != x, x.dtype.type(0), y).astype(x.dtype)


def direct32(s, e, mode):
    """Round the exact value s+e (f64 pair, s = fl(s+e)) to f32 with mode rn/rz/rm/rp."""
    t = odd(s, e)
    y = t.astype(f32)
    if mode == "rn":
        return y
    yd = y.astype(f64)
    big, small = yd > t, yd < t
    b = y.view(u32).copy()
    neg = np.signbit(t)
    if mode == "rz":
        b[(big & ~neg) | (small & neg)] -= u32(1)
        return b.view(f32)
    if mode == "rm":
        return np.where(big, np.nextafter(y, f32(-np.inf)), y)
    return np.where(small, np.nextafter(y, f32(np.inf)), y)


def direct64(s, e, mode):
    """Round s+e (s = fl_rn(s+e)) to f64 with a directed mode."""
    if mode == "rn":
        return s
    up, dn = e > 0, e < 0
    if mode == "rm":
        return np.where(dn, np.nextafter(s, -np.inf), s)
    if mode == "rp":
        return np.where(up, np.nextafter(s, np.inf), s)
    neg = s < 0
    return np.where(dn & ~neg, np.nextafter(s, -np.inf), np.where(up & neg, np.nextafter(s, np.inf), s))


def tf32_rna(x):
    b = x.view(u32)
    r = (b + u32(0x1000)) & u32(0xFFFFE000)
    exp = (b & u32(0x7F800000)) == u32(0x7F800000)
    return np.where(exp, np.where(x != x, u32(0x7FFFFFFF), b), r).view(f32)


def tf32_rn(x):
    b = x.view(u32)
    r = (b + (u32(0xFFF) + ((b >> u32(13)) & u32(1)))) & u32(0xFFFFE000)
    exp = (b & u32(0x7F800000)) == u32(0x7F800000)
    return np.where(exp, np.where(x != x, u32(0x7FFFFFFF), b), r).view(f32)


def bitlen64(x):
    """Number of significant bits of each u64."""
    hi = (x >> u64(32)).astype(f64)
    lo = (x & u64(0xFFFFFFFF)).astype(f64)
    eh, el = np.frexp(hi)[1], np.frexp(lo)[1]
    return np.where(hi > 0, eh + 32, el)


def bitlen32(x):
    return np.frexp(x.astype(f64))[1]


_REV = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)


def brev(x):
    n = x.dtype.itemsize
    return _REV[np.ascontiguousarray(x).view(np.uint8)].reshape(-1, n)[:, ::-1].copy().view(x.dtype).ravel()
