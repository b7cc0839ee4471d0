"""Floating-point arithmetic: f32, f64, f16, bf16 and the packed forms."""

from __future__ import annotations
import numpy as np
from .binder import op, unsupported, type_of, VIEW
from .parser import Imm, TYPE_SIZE
from .numeric import (
    bf_to_f32,
    f32_to_bf,
    fma32,
    fma64,
    fma_odd64,
    f64_to_f32_odd,
    flush32,
    sat,
    two_sum,
    two_prod,
    direct32,
    direct64,
    odd,
)

u16, u32, u64 = np.uint16, np.uint32, np.uint64
f16, f32, f64 = np.float16, np.float32, np.float64
RND = ("rn", "rz", "rm", "rp")


def rnd(ins):
    return next((m for m in ins.mods if m in RND), "rn")


def half_src(b, o, t):
    """Operand of a half type as a function giving f32 (f16/bf16) over T or 2T elements."""
    x = b.src(o, t, full=t.endswith("x2"))
    if t.startswith("f16"):
        v = x.view(f16)
        return lambda: v.astype(f32)
    v = x.view(u16)
    return lambda: bf_to_f32(v)


def half_out(t, y):
    """f32 (rounded to odd or exact enough) -> storage array of type t."""
    r = y.astype(f16).view(u16) if t.startswith("f16") else f32_to_bf(np.ascontiguousarray(y))
    return r.view(u32) if t.endswith("x2") else r


def half_post(ins, t, y):
    if "relu" in ins.mods:
        y = np.where(y != y, y, np.maximum(y, f32(0)))
    if "sat" in ins.mods:
        y = sat(y)
    if "ftz" in ins.mods and t.startswith("f16"):
        y = np.where(np.abs(y) < f32(2.0**-14), np.copysign(f32(0), y), y)
    return y


def half_dst(b, ins, t):
    return b.dst(ins.ops[0], {"f16": "b16", "bf16": "b16"}.get(t, "b32"))


def half_arith(b, ins, t):
    xs = [half_src(b, o, t) for o in ins.ops[1:]]
    d = half_dst(b, ins, t)
    k = ins.op
    if k in ("fma", "mad"):

        def fn():
            x, y, z = xs[0](), xs[1](), xs[2]()
            s = fma_odd64(x, y, z.astype(f64))
            if t.startswith("f16"):
                r = s.astype(f16).astype(f32)
            else:
                r = f64_to_f32_odd(s)
            return half_out(t, half_post(ins, t, r))
    else:
        uf = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[k]
        fn = lambda: half_out(t, half_post(ins, t, uf(xs[0](), xs[1]())))
    return b.emit(ins, d, fn)


@op("fma")
def fma(b, ins):
    return arith(b, ins)


def _post32(ins):
    s, z = "sat" in ins.mods, "ftz" in ins.mods
    if not s and not z:
        return None

    def post(x):
        if z:
            x = flush32(np.ascontiguousarray(x))
        return sat(x) if s else x

    return post


def _in32(ins, x):
    """Source of an f32 op as a function, flushed if .ftz."""
    if "ftz" in ins.mods:
        if x.size == 1:
            y = flush32(x)
            return lambda: y
        return lambda: flush32(x)
    return lambda: x


def arith(b, ins):
    t = type_of(ins)
    if t in ("f16", "bf16", "f16x2", "bf16x2"):
        return half_arith(b, ins, t)
    k = ins.op
    mode = rnd(ins)
    if t == "f32x2":
        xs = [b.src(o, "u64", True).view(f32) for o in ins.ops[1:]]
        if k in ("fma", "mad"):
            fn = lambda: fma32(*xs).view(u64)
        else:
            uf = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[k]
            fn = lambda: uf(*xs).view(u64)
        return b.emit(ins, b.dst(ins.ops[0], "u64"), fn)
    xs = [b.src(o, t) for o in ins.ops[1:]]
    d = b.dst(ins.ops[0], t)
    if t == "f64":
        if mode == "rn":
            if k in ("fma", "mad"):
                return b.emit(ins, d, lambda: fma64(*xs))
            return b.emit_uf(ins, d, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[k], *xs)

        def fn64():
            x, y = xs[0], xs[1]
            if k in ("add", "sub"):
                s, e = two_sum(x, y if k == "add" else -y)
            elif k == "mul":
                s, e = two_prod(x, y)
            else:
                s = fma64(x, y, xs[2])
                p, pl = two_prod(x, y)
                e = (p - s) + xs[2] + pl
            return direct64(s, e, mode)

        return b.emit(ins, d, fn64)
    # f32
    post = _post32(ins)
    fs = [_in32(ins, x) for x in xs]
    if mode != "rn":

        def fnr():
            v = [f() for f in fs]
            if k in ("add", "sub"):
                s, e = two_sum(v[0].astype(f64), (v[1] if k == "add" else -v[1]).astype(f64))
            elif k == "mul":
                s = v[0].astype(f64) * v[1].astype(f64)
                e = np.zeros_like(s)
            else:
                s, e = two_sum(v[0].astype(f64) * v[1].astype(f64), v[2].astype(f64))
            r = direct32(s, np.where(np.isfinite(e), e, 0), mode)
            return post(r) if post else r

        return b.emit(ins, d, fnr)
    if k in ("fma", "mad"):
        if post is None:
            x, y, z = xs
            return b.emit(ins, d, lambda: fma32(x, y, z))
        return b.emit(ins, d, lambda: post(fma32(fs[0](), fs[1](), fs[2]())))
    uf = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[k]
    if post is None:
        return b.emit_uf(ins, d, uf, *xs)
    return b.emit(ins, d, lambda: post(uf(fs[0](), fs[1]())))


def div(b, ins):
    t = type_of(ins)
    x, y = b.src(ins.ops[1], t), b.src(ins.ops[2], t)
    d = b.dst(ins.ops[0], t)
    mode = rnd(ins)
    if t == "f64":
        if mode == "rn":
            return b.emit_uf(ins, d, np.divide, x, y)

        def fn():
            q = x / y
            p, pl = two_prod(q, y)
            return direct64(q, ((x - p) - pl) * np.sign(y), mode)

        return b.emit(ins, d, fn)
    fx, fy, post = _in32(ins, x), _in32(ins, y), _post32(ins)
    if "approx" in ins.mods:
        big = f32(2.0**126)

        def fa():
            p, q = fx(), fy()
            r = p / q
            r = np.where((np.abs(q) > big) & np.isfinite(p) & np.isfinite(q), np.copysign(f32(0), r), r)
            return post(r) if post else r

        return b.emit(ins, d, fa)
    if mode == "rn":
        if post is None:
            return b.emit_uf(ins, d, np.divide, x, y)
        return b.emit(ins, d, lambda: post(fx() / fy()))

    def fr():
        p, q = fx().astype(f64), fy().astype(f64)
        s = p / q
        e = (p - s * q) * np.sign(q)  # sign of the remainder decides
        r = direct32(s, np.where(np.isfinite(e), np.sign(e) * 1e-300, 0), mode)
        return post(r) if post else r

    return b.emit(ins, d, fr)


def absneg(b, ins):
    t = type_of(ins)
    bits = {"f32": "b32", "f64": "b64", "f16": "b16", "bf16": "b16"}.get(t, "b32")
    x, d = b.src(ins.ops[1], bits), b.dst(ins.ops[0], bits)
    n = TYPE_SIZE[t]
    sign = 0x80008000 if t.endswith("x2") else 1 << (8 * n - 1)
    dt = {2: u16, 4: u32, 8: u64}[n]
    isabs = ins.op == "abs"
    m = np.array([sign ^ ((1 << 8 * n) - 1) if isabs else sign], dt)
    uf = np.bitwise_and if isabs else np.bitwise_xor
    if t == "f32" and "ftz" in ins.mods:
        return b.emit(ins, d, lambda: flush32(uf(x, m).view(f32)).view(u32))
    return b.emit_uf(ins, d, uf, x, m)


def _mm(x, y, ismin, nanprop, xorsign):
    """min/max with PTX rules: -0 < +0; NaN loses (or wins with .NaN)."""
    uf = (np.minimum if ismin else np.maximum) if nanprop else (np.fmin if ismin else np.fmax)
    r = uf(x, y)
    z = r == 0
    if z.any():
        s = (np.signbit(x) | np.signbit(y)) if ismin else (np.signbit(x) & np.signbit(y))
        both = z & (x == 0) & (y == 0)
        r = np.where(both, np.where(s, r.dtype.type(-0.0), r.dtype.type(0.0)), r)
    if xorsign:
        r = np.copysign(np.abs(r), np.where(np.signbit(x) ^ np.signbit(y), r.dtype.type(-1), r.dtype.type(1)))
    return r


def minmax(b, ins):
    t = type_of(ins)
    ismin, nanp = ins.op == "min", "NaN" in ins.mods
    xors = "xorsign" in ins.mods
    if t in ("f16", "bf16", "f16x2", "bf16x2"):
        xs = [half_src(b, o, t) for o in ins.ops[1:]]

        def fh():
            x, y = xs[0](), xs[1]()
            if xors:
                r = _mm(np.abs(x), np.abs(y), ismin, nanp, False)
                r = np.copysign(r, np.where(np.signbit(x) ^ np.signbit(y), f32(-1), f32(1)))
            else:
                r = _mm(x, y, ismin, nanp, False)
            h = half_out(t, half_post(ins, t, r))
            return _canon_half(h, r, t)

        return b.emit(ins, half_dst(b, ins, t), fh)
    xs = [b.src(o, t) for o in ins.ops[1:]]
    d = b.dst(ins.ops[0], t)
    fs = [_in32(ins, x) if t == "f32" else (lambda x=x: x) for x in xs]
    bits = u32 if t == "f32" else u64
    canon = 0x7FFFFFFF if t == "f32" else 0x7FFFFFFFFFFFFFFF

    def fn():
        v = [f() for f in fs]
        if xors:
            r = _mm(np.abs(v[0]), np.abs(v[1]), ismin, nanp, False)
            r = np.copysign(r, np.where(np.signbit(v[0]) ^ np.signbit(v[1]), r.dtype.type(-1), r.dtype.type(1)))
        else:
            r = _mm(v[0], v[1], ismin, nanp, False)
        for w in v[2:]:
            r = _mm(r, w, ismin, nanp, False)
        n = r != r
        if n.any():
            r = r.copy()
            r.view(bits)[n] = bits(canon)
        return r

    return b.emit(ins, d, fn)


def _canon_half(h, r, t):
    n = r != r
    if n.any():
        v = h.view(u16)
        v[n] = 0x7FFF
    return h


# ---- special functions: computed in f64 and rounded, i.e. at least as exact as the hardware --------
_FN = {
    "sqrt": np.sqrt,
    "rcp": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@op("sqrt", "rcp", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def special(b, ins):
    t = type_of(ins)
    fn, mode = _FN[ins.op], rnd(ins)
    if t in ("f16", "bf16", "f16x2", "bf16x2"):
        x = half_src(b, ins.ops[1], t)
        return b.emit(ins, half_dst(b, ins, t), lambda: half_out(t, fn(x().astype(f64)).astype(f32)))
    x, d = b.src(ins.ops[1], t), b.dst(ins.ops[0], t)
    if t == "f64":
        if mode != "rn" and "approx" not in ins.mods:

            def f64r():
                y = fn(x)
                if ins.op == "sqrt":
                    p, pl = two_prod(y, y)
                    e = (x - p) - pl
                else:
                    p, pl = two_prod(y, x)
                    e = ((1.0 - p) - pl) * np.sign(x)
                return direct64(y, np.where(np.isfinite(e), e, 0), mode)

            return b.emit(ins, d, f64r)
        return b.emit(ins, d, lambda: fn(x))
    fx, post = _in32(ins, x), _post32(ins)
    if mode != "rn" and "approx" not in ins.mods:

        def f32r():
            v = fx().astype(f64)
            y = fn(v)
            e = (v - y * y) if ins.op == "sqrt" else (1.0 - y * v) * np.sign(v)
            r = direct32(y, np.where(np.isfinite(e), np.sign(e) * 1e-300, 0), mode)
            return post(r) if post else r

        return b.emit(ins, d, f32r)
    if ins.op == "sqrt" and post is None:
        return b.emit_uf(ins, d, np.sqrt, x)

    def f():
        r = fn(fx().astype(f64)).astype(f32)
        return post(r) if post else r

    return b.emit(ins, d, f)


@op("copysign")
def copysign(b, ins):
    t = type_of(ins)
    x, y = b.src(ins.ops[1], t), b.src(ins.ops[2], t)
    return b.emit(ins, b.dst(ins.ops[0], t), lambda: np.copysign(y, x))


@op("testp")
def testp(b, ins):
    t = type_of(ins)
    x = b.src(ins.ops[1], t)
    tiny = np.finfo(VIEW[t]).tiny
    fn = {
        "finite": lambda: np.isfinite(x),
        "infinite": lambda: np.isinf(x),
        "number": lambda: x == x,
        "notanumber": lambda: x != x,
        "normal": lambda: np.isfinite(x) & (np.abs(x) >= tiny),
        "subnormal": lambda: (x != 0) & (np.abs(x) < tiny),
    }[ins.mods[0]]
    return b.emit(ins, b.raw(ins.ops[0]), fn)
