"""cvt and cvt.pack."""

from __future__ import annotations
import numpy as np
from .binder import op, unsupported, VIEW, UINT
from .parser import TYPE_SIZE
from .numeric import bf_to_f32, f32_to_bf, f64_to_f32_odd, flush32, sat, direct32, tf32_rna, tf32_rn

u16, u32, u64 = np.uint16, np.uint32, np.uint64
i64 = np.int64
f16, f32, f64 = np.float16, np.float32, np.float64
FL = {"f16", "bf16", "f32", "f64", "tf32"}
CVT_TYPES = set(TYPE_SIZE) | {"e4m3x2", "e5m2x2", "e2m1x2", "e2m3x2", "e3m2x2", "ue8m0x2"}


def _round_half(y32, t, mode, relu, satf):
    """f32 -> f16/bf16 storage (u16), with mode rn or rz (rm/rp via nextafter-free bit steps)."""
    y32 = np.ascontiguousarray(y32)
    if relu:
        y32 = np.where(y32 != y32, y32, np.maximum(y32, f32(0)))
    if mode == "rn":
        r = y32.astype(f16).view(u16).copy() if t == "f16" else f32_to_bf(y32)
    elif t == "bf16":
        b = y32.view(u32)
        r = (b >> u32(16)).astype(u16)
        if mode != "rz":
            inexact = ((b & u32(0xFFFF)) != 0) & np.isfinite(y32)
            neg = np.signbit(y32)
            r = np.where(inexact & (neg if mode == "rm" else ~neg), r + u16(1), r)
        r = np.where(y32 != y32, u16(0x7FFF), r)
    else:
        h = y32.astype(f16)
        v = h.astype(f32)
        r = h.view(u16).copy()
        fin = np.isfinite(y32)
        neg = np.signbit(y32)
        over, under = (v > y32) & fin, (v < y32) & fin
        if mode == "rz":
            r = np.where((over & ~neg) | (under & neg), r - u16(1), r)
        elif mode == "rm":
            r = np.where(over, np.where(neg, r + u16(1), r - u16(1)), r)
        else:
            r = np.where(under, np.where(neg, r - u16(1), r + u16(1)), r)
    if satf:
        top = u16(0x7BFF if t == "f16" else 0x7F7F)
        r = np.where(((r & u16(0x7FFF)) > top) & (y32 == y32), (r & u16(0x8000)) | top, r)
    n = y32 != y32
    if n.any():
        r = np.where(n, u16(0x7FFF), r)
    return r


@op("cvt")
def cvt(b, ins):
    if ins.mods[0] == "pack":
        return cvt_pack(b, ins)
    types = [m for m in ins.mods if m in CVT_TYPES]
    dt, st = types[0], types[-1]
    if dt.startswith(("e4", "e5", "e2", "e3", "ue")) or st.startswith(("e4", "e5", "e2", "e3", "ue")):
        return cvt_fp8(b, ins, dt, st)
    mods = set(ins.mods)
    mode = next((m for m in ins.mods if m in ("rn", "rz", "rm", "rp", "rna", "rs")), None)
    imode = next((m for m in ins.mods if m in ("rni", "rzi", "rmi", "rpi")), None)
    ftz, dosat, relu, satf = "ftz" in mods, "sat" in mods, "relu" in mods, "satfinite" in mods
    if mode == "rs":
        unsupported(ins)
    if dt in ("f16x2", "bf16x2"):
        hi, lo = b.src(ins.ops[1], "f32"), b.src(ins.ops[2], "f32")
        t = dt[:-2]

        def fnp():
            return _round_half(lo, t, mode or "rn", relu, satf).astype(u32) | (
                _round_half(hi, t, mode or "rn", relu, satf).astype(u32) << u32(16)
            )

        return b.emit(ins, b.dst(ins.ops[0], "b32"), fnp)
    if dt == "tf32":
        x = b.src(ins.ops[1], "f32")
        rf = tf32_rn if mode == "rn" else tf32_rna

        def ft():
            y = np.where(x != x, x, np.maximum(x, f32(0))) if relu else x
            if mode == "rz":
                return (np.ascontiguousarray(y).view(u32) & u32(0xFFFFE000)).view(f32)
            return rf(np.ascontiguousarray(y))

        return b.emit(ins, b.dst(ins.ops[0], "f32"), ft)
    x = b.src(ins.ops[1], st)
    d = b.dst(ins.ops[0], {"bf16": "b16", "f16": "f16"}.get(dt, dt))
    if st not in FL and dt not in FL:
        return b.emit(ins, d, _int_int(x, st, dt, dosat))
    if st not in FL:
        return b.emit(ins, d, _int_float(x, st, dt, mode or "rn"))
    if st == "bf16":
        src = lambda: bf_to_f32(x)
    elif ftz and st == "f32":
        src = lambda: flush32(x)
    else:
        src = lambda: x
    if dt not in FL:
        return b.emit(ins, d, _float_int(src, dt, imode or "rzi"))
    return b.emit(ins, d, _float_float(src, st, dt, mode, imode, ftz, dosat, relu, satf))


def _int_int(x, st, dt, dosat):
    v = np.dtype(VIEW[dt])
    if not dosat:
        return lambda: x.astype(v)
    info = np.iinfo(v)

    def fn():
        if x.dtype == np.uint64:
            return np.minimum(x, u64(info.max)).astype(v)
        y = x.astype(i64)
        return (np.maximum(y, 0).astype(u64) if info.max > 2**63 else np.clip(y, info.min, info.max)).astype(v)

    return fn


def _int_float(x, st, dt, mode):
    if dt == "f64" and TYPE_SIZE[st] < 8:
        return lambda: x.astype(f64)
    if dt == "f32" and mode == "rn":
        return lambda: x.astype(f32)
    if dt == "f64" and mode == "rn":
        return lambda: x.astype(f64)
    if dt in ("f16", "bf16"):

        def fh():
            y = x.astype(f64)
            e = _int_err(x, y)
            from .numeric import odd

            return _half_view(_round_half(f64_to_f32_odd(odd(y, e)), dt, mode, False, False), dt)

        return fh

    def fn():
        y = x.astype(f64)
        e = _int_err(x, y)
        if dt == "f64":
            from .numeric import direct64

            return direct64(y, e, mode)
        return direct32(y, e, mode)

    return fn


def _half_view(r, dt):
    return r.view(f16) if dt == "f16" else r


def _int_err(x, y):
    """x - y exactly in sign (for 64-bit integers whose f64 image is rounded)."""
    if x.dtype.itemsize < 8:
        return np.zeros_like(y)
    ld = np.longdouble
    return (x.astype(ld) - y.astype(ld)).astype(f64)


def _float_int(src, dt, imode):
    info = np.iinfo(VIEW[dt])
    rf = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[imode]
    lo, hi = float(info.min), float(info.max)
    v = np.dtype(VIEW[dt])

    def fn():
        y = rf(src().astype(f64))
        nan = y != y
        big, small = y >= hi, y <= lo
        z = np.where(nan | big | small, 0.0, y)
        r = z.astype(u64).astype(v) if v == np.uint64 else z.astype(i64).astype(v)
        r = np.where(big, v.type(info.max), np.where(small, v.type(info.min), r))
        return np.where(nan, v.type(0), r) if nan.any() else r

    return fn


def _float_float(src, st, dt, mode, imode, ftz, dosat, relu, satf):
    ri = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(imode)

    def fn():
        y = src()
        if ri is not None:
            y = ri(y)
        if dt == "f64":
            r = y.astype(f64)
        elif dt == "f32":
            if st == "f64":
                r = y.astype(f32) if mode in (None, "rn") else direct32(y, np.zeros_like(y), mode)
            else:
                r = y.astype(f32)
            if ftz:
                r = flush32(r)
        else:
            y32 = f64_to_f32_odd(y) if st == "f64" else y.astype(f32)
            if st == "f64" and dt == "f16" and mode in (None, "rn") and not (dosat or relu or satf):
                return y.astype(f16)
            if dosat:
                y32 = sat(y32)
            return _half_view(_round_half(y32, dt, mode or "rn", relu, satf), dt)
        if relu:
            r = np.where(r != r, r, np.maximum(r, r.dtype.type(0)))
        return sat(r) if dosat else r

    return fn


def cvt_pack(b, ins):
    types = [m for m in ins.mods if m in TYPE_SIZE]
    ct, at = types[0], types[1]
    x, y = b.src(ins.ops[1], at), b.src(ins.ops[2], at)
    info = np.iinfo(VIEW[ct])
    bits = 8 * TYPE_SIZE[ct]
    z = b.src(ins.ops[3], "u32") if len(ins.ops) > 3 else None

    def c(v):
        return np.clip(v.astype(i64), info.min, info.max).astype(u64) & u64((1 << bits) - 1)

    def fn():
        r = (c(x) << u64(bits)) | c(y)
        if z is not None:
            r = r | (z.astype(u64) << u64(2 * bits))
        return r.astype(u32)

    return b.emit(ins, b.dst(ins.ops[0], "u32"), fn)


# ---- fp8 -----------------------------------------------------------------------------------------
def _fp8_table(ebits, mbits, bias, ieee):
    v = np.zeros(256, f64)
    for k in range(256):
        s, e, m = k >> 7, (k >> mbits) & ((1 << ebits) - 1), k & ((1 << mbits) - 1)
        if e == 0:
            x = m * 2.0 ** (1 - bias - mbits)
        elif ieee and e == (1 << ebits) - 1:
            x = np.inf if m == 0 else np.nan
        elif not ieee and e == (1 << ebits) - 1 and m == (1 << mbits) - 1:
            x = np.nan
        else:
            x = (1 + m / (1 << mbits)) * 2.0 ** (e - bias)
        v[k] = -x if s else x
    return v


_FP8 = {"e4m3": _fp8_table(4, 3, 7, False), "e5m2": _fp8_table(5, 2, 15, True)}


def _to_fp8(y, kind, relu):
    tab = _FP8[kind]
    pos = tab[:128]
    fin = np.isfinite(pos)
    grid = pos[fin]
    y = y.astype(f64)
    if relu:
        y = np.where(y != y, y, np.maximum(y, 0))
    a = np.minimum(np.abs(y), grid[-1])  # satfinite
    hi = np.clip(np.searchsorted(grid, a, "left"), 0, grid.size - 1)
    lo = np.maximum(hi - 1, 0)
    dl, dh = a - grid[lo], grid[hi] - a
    k = np.where((dl < dh) | ((dl == dh) & (lo % 2 == 0)), lo, hi)
    k = np.where(y != y, 0x7F, k)
    return (k | np.where(np.signbit(y) & (y == y), 0x80, 0)).astype(u16)


def cvt_fp8(b, ins, dt, st):
    relu = "relu" in ins.mods
    if dt in ("e4m3x2", "e5m2x2"):
        if st == "f32":
            hi, lo = b.src(ins.ops[1], "f32"), b.src(ins.ops[2], "f32")
            fn = lambda: _to_fp8(lo, dt[:4], relu) | (_to_fp8(hi, dt[:4], relu) << u16(8))
        elif st == "f16x2":
            x = b.src(ins.ops[1], "b32", True).view(f16)
            fn = lambda: _to_fp8(x[0::2], dt[:4], relu) | (_to_fp8(x[1::2], dt[:4], relu) << u16(8))
        else:
            unsupported(ins)
        return b.emit(ins, b.dst(ins.ops[0], "b16"), fn)
    if st in ("e4m3x2", "e5m2x2") and dt == "f16x2":
        x = b.src(ins.ops[1], "b16")
        tab = _FP8[st[:4]].astype(f16).view(u16).astype(u32)
        return b.emit(ins, b.dst(ins.ops[0], "b32"), lambda: tab[x & u16(255)] | (tab[x >> u16(8)] << u32(16)))
    unsupported(ins)
