"""Integer, logic, comparison, selection and data movement instructions."""

from __future__ import annotations
import numpy as np
from .binder import op, unsupported, type_of, VIEW, UINT, SINT
from .parser import Reg, Imm, Sym, Vec, Pair, Not, TYPE_SIZE
from .numeric import bitlen32, bitlen64, brev, flush32, bf_to_f32
from . import ops_float as F

u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i32, i64 = np.int32, np.int64
FLOATS = {"f16", "bf16", "f16x2", "bf16x2", "f32", "f64", "f32x2"}
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def _unsigned(t):
    return {"s16": "u16", "s32": "u32", "s64": "u64", "s8": "u8"}.get(t, t)


@op("add", "sub")
def addsub(b, ins):
    t = type_of(ins)
    if t in FLOATS:
        return F.arith(b, ins)
    if "cc" in ins.mods:
        return carry(b, ins)
    if t in ("u16x2", "s16x2"):
        x, y = (b.src(o, t, True).view(u16) for o in ins.ops[1:3])
        uf = np.add if ins.op == "add" else np.subtract
        return b.emit(ins, b.dst(ins.ops[0], t), lambda: uf(x, y).view(u32))
    if "sat" in ins.mods:
        x, y = b.src(ins.ops[1], "s32"), b.src(ins.ops[2], "s32")
        sg = 1 if ins.op == "add" else -1
        return b.emit(
            ins, b.dst(ins.ops[0], "s32"), lambda: np.clip(x.astype(i64) + sg * y.astype(i64), -(2**31), 2**31 - 1)
        )
    t = _unsigned(t)
    return b.emit_uf(
        ins,
        b.dst(ins.ops[0], t),
        np.add if ins.op == "add" else np.subtract,
        b.src(ins.ops[1], t),
        b.src(ins.ops[2], t),
    )


@op("addc", "subc", "madc")
def carry(b, ins):
    """add.cc / addc / sub.cc / subc / mad.cc / madc."""
    t = _unsigned(type_of(ins))
    cc, S = b.S.cc, b.S
    d = b.dst(ins.ops[0], t)
    xs = [b.src(o, t) for o in ins.ops[1:]]
    use = ins.op in ("addc", "subc", "madc")
    setc = "cc" in ins.mods
    base = ins.op.rstrip("c") if use else ins.op
    signed = type_of(ins).startswith("s")

    def fn():
        if base == "mad":
            x = np.multiply(xs[0], xs[1]) if "lo" in ins.mods else _mulhi(xs[0], xs[1], t, signed)
            y = xs[2]
        else:
            x, y = xs
        c = cc.astype(d.dtype) if use else d.dtype.type(0)
        if base == "sub":
            r = x - y - c
            if setc:
                co = (x < y) | ((x == y) & (cc if use else False))
        else:
            r = x + y
            co = r < x
            r2 = r + c
            if setc:
                co = co | (r2 < r)
            r = r2
        return (r, co) if setc else (r,)

    return b.emit_multi(ins, [d, cc], fn)


def _mulhi(x, y, t, signed=None):
    n = TYPE_SIZE[t]
    if signed is None:
        signed = t.startswith("s")
    if n < 8:
        w = (SINT if signed else UINT)[2 * n]
        if signed:
            x, y = x.view(SINT[n]), y.view(SINT[n])
        return (x.astype(w) * y.astype(w) >> w(8 * n)).astype(UINT[n])
    x, y = np.broadcast_arrays(x.view(u64), y.view(u64))
    m, s = u64(0xFFFFFFFF), u64(32)
    a, b, c, d = x >> s, x & m, y >> s, y & m
    bd, ad, bc, ac = b * d, a * d, b * c, a * c
    mid = (bd >> s) + (ad & m) + (bc & m)
    hi = ac + (ad >> s) + (bc >> s) + (mid >> s)
    if signed:
        hi = hi - np.where(x.view(i64) < 0, y, u64(0)) - np.where(y.view(i64) < 0, x, u64(0))
    return hi


@op("mul", "mad")
def mul(b, ins):
    t = type_of(ins)
    if t in FLOATS:
        return F.arith(b, ins)
    if "cc" in ins.mods:
        return carry(b, ins)
    mad = ins.op == "mad"
    if "wide" in ins.mods:
        w = WIDER[t]
        wd = VIEW[w]
        x, y = b.src(ins.ops[1], t), b.src(ins.ops[2], t)
        d = b.dst(ins.ops[0], w)
        if not mad:
            return b.emit(ins, d, lambda: np.multiply(x, y, dtype=wd))
        z = b.src(ins.ops[3], w)
        return b.emit(ins, d, lambda: np.multiply(x, y, dtype=wd) + z)
    if "hi" in ins.mods:
        x, y = b.src(ins.ops[1], t), b.src(ins.ops[2], t)
        tu = _unsigned(t)
        d = b.dst(ins.ops[0], tu)
        if not mad:
            return b.emit(ins, d, lambda: _mulhi(x, y, t))
        z = b.src(ins.ops[3], tu)
        if "sat" in ins.mods:
            unsupported(ins)
        return b.emit(ins, d, lambda: _mulhi(x, y, t) + z)
    t = _unsigned(t)
    x, y = b.src(ins.ops[1], t), b.src(ins.ops[2], t)
    d = b.dst(ins.ops[0], t)
    if not mad:
        return b.emit_uf(ins, d, np.multiply, x, y)
    z = b.src(ins.ops[3], t)
    return b.emit(ins, d, lambda: x * y + z)


@op("mul24", "mad24")
def mul24(b, ins):
    t = type_of(ins)
    x, y = b.src(ins.ops[1], t), b.src(ins.ops[2], t)
    w = i64 if t == "s32" else u64
    hi = "hi" in ins.mods

    def ext(v):
        return ((v.view(i32) << i32(8)) >> i32(8)).astype(w) if t == "s32" else (v & u32(0xFFFFFF)).astype(w)

    z = b.src(ins.ops[3], "u32") if ins.op == "mad24" else u32(0)
    return b.emit(ins, b.dst(ins.ops[0], "u32"), lambda: ((ext(x) * ext(y)) >> w(16 if hi else 0)).astype(u32) + z)


@op("sad")
def sad(b, ins):
    t = type_of(ins)
    x, y, z = (b.src(o, t) for o in ins.ops[1:4])
    return b.emit(ins, b.dst(ins.ops[0], t), lambda: np.maximum(x, y) - np.minimum(x, y) + z)


@op("div", "rem")
def divrem(b, ins):
    t = type_of(ins)
    if t in FLOATS:
        return F.div(b, ins)
    x, y = b.src(ins.ops[1], t), b.src(ins.ops[2], t)
    d = b.dst(ins.ops[0], t)
    isdiv = ins.op == "div"
    if t[0] == "u":
        full = np.iinfo(VIEW[t]).max

        def fn():
            z = y == 0
            yy = np.where(z, y.dtype.type(1), y)
            return np.where(z, full, x // yy) if isdiv else np.where(z, x, x % yy)
    else:
        ut = UINT[TYPE_SIZE[t]]

        def fn():
            z = y == 0
            ax = np.abs(x).view(ut)
            ay = np.where(z, ut(1), np.abs(y).view(ut))
            if isdiv:
                q = ax // ay
                r = np.where((x < 0) != (y < 0), ut(0) - q, q)
                return np.where(z, ut(0) - ut(1), r).view(d.dtype)
            q = ax % ay
            return np.where(z, x.view(ut), np.where(x < 0, ut(0) - q, q)).view(d.dtype)

    return b.emit(ins, d, fn)


@op("abs", "neg")
def absneg(b, ins):
    t = type_of(ins)
    if t in FLOATS:
        return F.absneg(b, ins)
    x, d = b.src(ins.ops[1], t), b.dst(ins.ops[0], t)
    return b.emit_uf(ins, d, np.abs if ins.op == "abs" else np.negative, x)


@op("min", "max")
def minmax(b, ins):
    t = type_of(ins)
    if t in FLOATS:
        return F.minmax(b, ins)
    uf = np.minimum if ins.op == "min" else np.maximum
    if t in ("u16x2", "s16x2"):
        v = u16 if t[0] == "u" else np.int16
        x, y = (b.src(o, t, True).view(v) for o in ins.ops[1:3])
        relu = "relu" in ins.mods
        return b.emit(ins, b.dst(ins.ops[0], t), lambda: (np.maximum(uf(x, y), v(0)) if relu else uf(x, y)).view(u32))
    x, y, d = b.src(ins.ops[1], t), b.src(ins.ops[2], t), b.dst(ins.ops[0], t)
    if "relu" in ins.mods:
        return b.emit(ins, d, lambda: np.maximum(uf(x, y), 0))
    return b.emit_uf(ins, d, uf, x, y)


# ---- logic ------------------------------------------------------------------------------------
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@op("and", "or", "xor")
def logic(b, ins):
    t = type_of(ins)
    uf = _LOGIC[ins.op]
    if t == "pred":
        x, y = b.psrc(ins.ops[1]), b.psrc(ins.ops[2])
        return b.emit(ins, b.raw(ins.ops[0]), lambda: uf(x(), y()))
    return b.emit_uf(ins, b.dst(ins.ops[0], t), uf, b.src(ins.ops[1], t), b.src(ins.ops[2], t))


@op("not")
def not_(b, ins):
    t = type_of(ins)
    if t == "pred":
        x = b.psrc(ins.ops[1])
        return b.emit(ins, b.raw(ins.ops[0]), lambda: ~x())
    return b.emit_uf(ins, b.dst(ins.ops[0], t), np.invert, b.src(ins.ops[1], t))


@op("cnot")
def cnot(b, ins):
    t = type_of(ins)
    x = b.src(ins.ops[1], t)
    return b.emit(ins, b.dst(ins.ops[0], t), lambda: x == 0)


@op("lop3")
def lop3(b, ins):
    if "and" in ins.mods or "or" in ins.mods or isinstance(ins.ops[0], Pair):
        unsupported(ins, "lop3 with predicate result")
    x, y, z = (b.src(o, "b32") for o in ins.ops[1:4])
    lut = ins.ops[4].value
    d = b.dst(ins.ops[0], "b32")
    simple = {
        0x96: lambda: x ^ y ^ z,
        0x80: lambda: x & y & z,
        0xFE: lambda: x | y | z,
        0xF8: lambda: x | (y & z),
        0xEA: lambda: (x & y) | z,
        0xCA: lambda: (x & y) | (~x & z),
        0xE8: lambda: (x & y) | (x & z) | (y & z),
        0x6A: lambda: (x & y) ^ z,
        0x78: lambda: x ^ (y & z),
        0xE0: lambda: x & (y | z),
        0xA8: lambda: (x | y) & z,
    }
    if lut in simple:
        return b.emit(ins, d, simple[lut])

    def fn():
        r = np.zeros(1, u32)
        nx, ny, nz = ~x, ~y, ~z
        for i in range(8):
            if lut >> i & 1:
                r = r | ((x if i & 4 else nx) & (y if i & 2 else ny) & (z if i & 1 else nz))
        return r

    return b.emit(ins, d, fn)


# ---- shifts and bit fields -----------------------------------------------------------------------
def _amount(b, o, bits, dt):
    if isinstance(o, Imm):
        n = o.value & 0xFFFFFFFF
        return n, None
    a = b.src(o, "u32")
    return None, (lambda: np.minimum(a, u32(bits)).astype(dt))


@op("shl", "shr")
def shift(b, ins):
    t = type_of(ins)
    bits = 8 * TYPE_SIZE[t]
    signed = t[0] == "s" and ins.op == "shr"
    vt = t if signed else _unsigned(t)
    x, d = b.src(ins.ops[1], vt), b.dst(ins.ops[0], vt)
    dt = np.dtype(VIEW[vt]).type
    n, amt = _amount(b, ins.ops[2], bits, dt)
    uf = np.left_shift if ins.op == "shl" else np.right_shift
    if amt is None:
        return b.emit_uf(ins, d, uf, x, np.array([min(n, bits)], dt))
    return b.emit(ins, d, lambda: uf(x, amt()))


@op("shf")
def shf(b, ins):
    lo, hi = b.src(ins.ops[1], "u32"), b.src(ins.ops[2], "u32")
    wrap, left = "wrap" in ins.mods, "l" in ins.mods
    c = b.src(ins.ops[3], "u32")

    def fn():
        n = (c & u32(31) if wrap else np.minimum(c, u32(32))).astype(u64)
        v = (hi.astype(u64) << u64(32)) | lo
        return (v << n) >> u64(32) if left else v >> n

    return b.emit(ins, b.dst(ins.ops[0], "u32"), fn)


@op("bfe")
def bfe(b, ins):
    t = type_of(ins)
    bits = 8 * TYPE_SIZE[t]
    x, d = b.src(ins.ops[1], t), b.dst(ins.ops[0], t)
    p, l = ins.ops[2], ins.ops[3]
    if t[0] == "u" and isinstance(p, Imm) and isinstance(l, Imm):
        dt = VIEW[t]
        pos, ln = p.value & 255, l.value & 255
        sh = np.array([min(pos, bits)], dt)
        mk = np.array([(1 << min(ln, bits)) - 1], dt)
        return b.emit(ins, d, lambda: (x >> sh) & mk)
    pp, ll = b.src(p, "u32"), b.src(l, "u32")
    if t[0] == "u":

        def fn():
            pos, ln = (pp & u32(255)).astype(u64), np.minimum(ll & u32(255), u32(64)).astype(u64)
            return (x.astype(u64) >> np.minimum(pos, u64(64))) & ((u64(1) << ln) - u64(1))
    else:

        def fn():
            pos, ln = (pp & u32(255)).astype(i64), (ll & u32(255)).astype(i64)
            v = x.astype(i64) >> np.minimum(pos, 63)
            s = np.clip(64 - ln, 0, 63)
            return np.where(ln == 0, i64(0), np.where(ln >= bits, v, (v << s) >> s))

    return b.emit(ins, d, fn)


@op("bfi")
def bfi(b, ins):
    t = type_of(ins)
    dt = VIEW[t]
    bits = 8 * TYPE_SIZE[t]
    x, y = b.src(ins.ops[1], t), b.src(ins.ops[2], t)
    pp, ll = b.src(ins.ops[3], "u32"), b.src(ins.ops[4], "u32")

    def fn():
        pos = np.minimum(pp & u32(255), u32(bits)).astype(dt)
        ln = np.minimum(ll & u32(255), u32(bits)).astype(dt)
        m = ((dt(1) << ln) - dt(1)) << pos
        return (y & ~m) | ((x << pos) & m)

    return b.emit(ins, b.dst(ins.ops[0], t), fn)


@op("bmsk")
def bmsk(b, ins):
    p, l = b.src(ins.ops[1], "u32"), b.src(ins.ops[2], "u32")
    wrap = "wrap" in ins.mods

    def fn():
        a = (p & u32(31) if wrap else np.minimum(p, u32(32))).astype(u64)
        n = (l & u32(31) if wrap else np.minimum(l, u32(32))).astype(u64)
        return ((u64(1) << n) - u64(1)) << a

    return b.emit(ins, b.dst(ins.ops[0], "u32"), fn)


@op("popc", "clz", "brev", "bfind")
def bits(b, ins):
    t = type_of(ins)
    n = 8 * TYPE_SIZE[t]
    length = bitlen32 if n == 32 else bitlen64
    tu = "u32" if n == 32 else "u64"
    x = b.src(ins.ops[1], tu)
    if ins.op == "brev":
        return b.emit(ins, b.dst(ins.ops[0], tu), lambda: brev(x))
    d = b.dst(ins.ops[0], "u32")
    if ins.op == "popc":
        return b.emit(ins, d, lambda: np.bitwise_count(x))
    if ins.op == "clz":
        return b.emit(ins, d, lambda: n - length(x))
    amt = "shiftamt" in ins.mods
    signed = t[0] == "s"

    def fn():
        v = np.where(x.view(SINT[n // 8]) < 0, ~x, x) if signed else x
        p = length(v).astype(i64) - 1
        return np.where(p < 0, i64(0xFFFFFFFF), (n - 1 - p) if amt else p)

    return b.emit(ins, d, fn)


@op("fns")
def fns(b, ins):
    m, base, off = b.src(ins.ops[1], "u32", True), b.src(ins.ops[2], "u32", True), b.src(ins.ops[3], "s32", True)

    def one(v, s, o):
        cand = [i for i in range(32) if v >> i & 1]
        if o == 0:
            return s if v >> s & 1 else 0xFFFFFFFF
        if o > 0:
            c = [i for i in cand if i >= s]
            return c[o - 1] if len(c) >= o else 0xFFFFFFFF
        c = [i for i in cand if i <= s][::-1]
        return c[-o - 1] if len(c) >= -o else 0xFFFFFFFF

    return b.emit(
        ins,
        b.dst(ins.ops[0], "u32"),
        lambda: np.array([one(int(v), int(s) & 31, int(o)) for v, s, o in zip(m, base, off)], u32),
    )


@op("prmt")
def prmt(b, ins):
    x, y = b.src(ins.ops[1], "u32", True), b.src(ins.ops[2], "u32", True)
    d = b.dst(ins.ops[0], "u32")
    mode = next((m for m in ins.mods if m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")), None)
    T = b.S.T
    if mode is None and isinstance(ins.ops[3], Imm):
        sel = [(ins.ops[3].value >> (4 * i)) & 15 for i in range(4)]

        def fn():
            bx, by = x.view(u8).reshape(T, 4), y.view(u8).reshape(T, 4)
            r = np.empty((T, 4), u8)
            for i, s in enumerate(sel):
                v = bx[:, s & 3] if (s & 7) < 4 else by[:, s & 3]
                r[:, i] = np.where(v & 0x80, 255, 0) if s & 8 else v
            return r.view(u32)[:, 0]

        return b.emit(ins, d, fn)
    c = b.src(ins.ops[3], "u32", True)
    tab = {
        "f4e": [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]],
        "b4e": [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]],
        "rc8": [[0] * 4, [1] * 4, [2] * 4, [3] * 4],
        "ecl": [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]],
        "ecr": [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]],
        "rc16": [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]],
    }

    def fn():
        by = np.concatenate([x.view(u8).reshape(T, 4), y.view(u8).reshape(T, 4)], 1)
        if mode is not None:
            s = np.array(tab[mode])[(c & u32(3)).astype(i64)]
        else:
            s = ((c[:, None] >> np.array([0, 4, 8, 12], u32)) & u32(15)).astype(i64)
        v = np.take_along_axis(by, s & 7, 1)
        v = np.where(s & 8, np.where(v & 0x80, u8(255), u8(0)), v).astype(u8)
        return np.ascontiguousarray(v).view(u32)[:, 0]

    return b.emit(ins, d, fn)


@op("dp4a", "dp2a")
def dpa(b, ins):
    ta, tb = [m for m in ins.mods if m in ("u32", "s32")]
    x, y, z = b.src(ins.ops[1], "u32", True), b.src(ins.ops[2], "u32", True), b.src(ins.ops[3], "u32")
    T = b.S.T
    v8 = {"u32": np.uint8, "s32": np.int8}
    v16 = {"u32": np.uint16, "s32": np.int16}
    if ins.op == "dp4a":
        fn = lambda: (x.view(v8[ta]).reshape(T, 4).astype(i64) * y.view(v8[tb]).reshape(T, 4)).sum(1) + z
    else:
        h = 2 if "hi" in ins.mods else 0
        fn = lambda: (x.view(v16[ta]).reshape(T, 2).astype(i64) * y.view(v8[tb]).reshape(T, 4)[:, h : h + 2]).sum(1) + z
    return b.emit(ins, b.dst(ins.ops[0], "u32"), fn)


# ---- comparison and selection -----------------------------------------------------------------
_CMP = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_UNORD = {"equ": "eq", "neu": "ne", "ltu": "lt", "leu": "le", "gtu": "gt", "geu": "ge"}


def compare(b, ins, t, x, y, c):
    """Function giving the bool array of x c y."""
    if t in ("bf16", "bf16x2"):
        x0, y0 = x, y
        x, y = (lambda: bf_to_f32(x0)), (lambda: bf_to_f32(y0))
    else:
        x0, y0 = x, y
        if "ftz" in ins.mods and t == "f32":
            x, y = (lambda: flush32(x0)), (lambda: flush32(y0))
        else:
            x, y = (lambda: x0), (lambda: y0)
    if c in _CMP:
        if c in ("lo", "ls", "hi", "hs") or t not in FLOATS:
            return lambda: _CMP[c](x(), y())
        if c == "ne":

            def fn():
                p, q = x(), y()
                return (p != q) & (p == p) & (q == q)

            return fn
        return lambda: _CMP[c](x(), y())
    if c in _UNORD:
        k = _CMP[_UNORD[c]]

        def fn():
            p, q = x(), y()
            return k(p, q) | (p != p) | (q != q)

        return fn
    if c == "num":
        return lambda: (x() == x()) & (y() == y())
    if c == "nan":
        return lambda: (x() != x()) | (y() != y())
    unsupported(ins, f"comparison {c}")


_BOOL = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _setp_parts(b, ins):
    mods = [m for m in ins.mods if m not in ("ftz",)]
    c = mods[0]
    bop = next((m for m in mods[1:] if m in _BOOL), None)
    return c, bop


@op("setp")
def setp(b, ins):
    t = type_of(ins)
    c, bop = _setp_parts(b, ins)
    dst = ins.ops[0]
    if t in ("f16x2", "bf16x2"):
        v = np.float16 if t == "f16x2" else u16
        x, y = b.src(ins.ops[1], t, True), b.src(ins.ops[2], t, True)
        ds = [b.raw(dst.a), b.raw(dst.b)] if isinstance(dst, Pair) else [b.raw(dst)]
        t1 = t[:-2]
        fs = [compare(b, ins, t1, x.view(v)[k::2], y.view(v)[k::2], c) for k in range(len(ds))]
        return b.emit_multi(ins, ds, lambda: [f() for f in fs])
    x, y = b.src(ins.ops[1], t), b.src(ins.ops[2], t)
    fn = compare(b, ins, t, x, y, c)
    if isinstance(dst, Pair):
        q = b.psrc(ins.ops[3]) if bop else None
        ds = [None if getattr(o, "name", "") == "_" else b.raw(o) for o in (dst.a, dst.b)]

        def two():
            r = fn()
            if q is None:
                return r, ~r
            qq = q()
            return _BOOL[bop](r, qq), _BOOL[bop](~r, qq)

        return b.emit_multi(ins, ds, two)
    d = b.raw(dst)
    if bop:
        q = b.psrc(ins.ops[3])
        return b.emit(ins, d, lambda: _BOOL[bop](fn(), q()))
    if c in _CMP and not (t in FLOATS and (c == "ne" or "ftz" in ins.mods or t == "bf16")):
        return b.emit_uf(ins, d, _CMP[c], x, y)
    return b.emit(ins, d, fn)


@op("set")
def set_(b, ins):
    types = [m for m in ins.mods if m in TYPE_SIZE]
    dt, t = types[0], types[-1]
    c, bop = _setp_parts(b, ins)
    q = b.psrc(ins.ops[3]) if bop else None
    d = b.dst(ins.ops[0], dt if dt != "bf16" else "u16")
    if t in ("f16x2", "bf16x2"):
        v = np.float16 if t == "f16x2" else u16
        x, y = b.src(ins.ops[1], t, True), b.src(ins.ops[2], t, True)
        fs = [compare(b, ins, t[:-2], x.view(v)[k::2], y.view(v)[k::2], c) for k in range(2)]
        one = {"f16x2": 0x3C00, "bf16x2": 0x3F80}.get(dt, 0xFFFF)
        return b.emit(ins, d, lambda: np.where(fs[0](), u32(one), u32(0)) | np.where(fs[1](), u32(one << 16), u32(0)))
    fn = compare(b, ins, t, b.src(ins.ops[1], t), b.src(ins.ops[2], t), c)

    def val():
        r = fn()
        if q is not None:
            r = _BOOL[bop](r, q())
        if dt in ("f32", "f16"):
            return r.astype(VIEW[dt])
        if dt == "bf16":
            return np.where(r, u16(0x3F80), u16(0))
        n = TYPE_SIZE[dt]
        return np.where(r, UINT[n]((1 << 8 * n) - 1), UINT[n](0)).view(VIEW[dt])

    return b.emit(ins, d, val)


@op("selp")
def selp(b, ins):
    t = type_of(ins)
    t = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}[TYPE_SIZE[t]]
    x, y, p = b.src(ins.ops[1], t), b.src(ins.ops[2], t), b.psrc(ins.ops[3])
    return b.emit(ins, b.dst(ins.ops[0], t), lambda: np.where(p(), x, y))


@op("slct")
def slct(b, ins):
    types = [m for m in ins.mods if m in TYPE_SIZE]
    t = {2: "b16", 4: "b32", 8: "b64"}[TYPE_SIZE[types[0]]]
    x, y, z = b.src(ins.ops[1], t), b.src(ins.ops[2], t), b.src(ins.ops[3], types[-1])
    return b.emit(ins, b.dst(ins.ops[0], t), lambda: np.where(z >= 0, x, y))


# ---- moves ---------------------------------------------------------------------------------------
@op("mov")
def mov(b, ins):
    t = type_of(ins)
    d, s = ins.ops
    if isinstance(d, Vec) or isinstance(s, Vec):
        return mov_vec(b, ins, t, d, s)
    if t == "pred":
        p = b.psrc(s)
        return b.emit(ins, b.raw(d), p)
    t = {1: "b8", 2: "b16", 4: "b32", 8: "b64", 16: "b128"}[TYPE_SIZE[t]]
    if t == "b128":
        x, dd = b.raw(s), b.raw(d)

        def f(S):
            l = S.path.lanes()
            if l is None:
                dd[:] = x
            else:
                dd[l] = x[l]

        return f
    dd = b.dst(d, t)
    if isinstance(s, Reg) and s.name in (
        "%clock",
        "%clock64",
        "%clock_hi",
        "%globaltimer",
        "%globaltimer_lo",
        "%globaltimer_hi",
    ):
        S, name = b.S, s.name

        def clk():
            S.tick(name)
            return S.special[name]

        return b.emit(ins, dd, clk)
    x = b.src(s, t)
    return b.emit(ins, dd, lambda: x)


def mov_vec(b, ins, t, d, s):
    size = TYPE_SIZE[t]
    T = b.S.T
    if isinstance(d, Vec) and isinstance(s, Vec):
        unsupported(ins)
    if isinstance(s, Vec):  # pack
        n = len(s.items)
        if t == "b128":
            xs = [b.src(o, "b64") for o in s.items]
            dd = b.raw(d)

            def f(S):
                l = slice(None) if S.path.lanes() is None else S.path.lanes()
                for k, x in enumerate(xs):
                    dd[l, k] = np.broadcast_to(x, (T,))[l]

            return f
        es = size // n
        et = {1: "b8", 2: "b16", 4: "b32"}[es]
        W = UINT[size]
        xs = [b.src(o, et) for o in s.items]

        def fn():
            r = xs[0].astype(W)
            for k in range(1, n):
                r = r | (xs[k].astype(W) << W(8 * es * k))
            return r

        return b.emit(ins, b.dst(d, t), fn)
    n = len(d.items)  # unpack
    es = size // n
    et = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}[es]
    ds = [None if getattr(o, "name", "") == "_" else b.dst(o, et) for o in d.items]
    if t == "b128":
        x = b.raw(s)
        return b.emit_multi(ins, ds, lambda: [x[:, k].copy() for k in range(n)])
    x = b.src(s, t, True)

    def fn():
        return np.ascontiguousarray(x).view(UINT[es]).reshape(T, n).T.copy()

    return b.emit_multi(ins, ds, fn)


@op("cvta")
def cvta(b, ins):
    from .memory import SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW

    t = type_of(ins)
    sp = next(m.split("::")[0] for m in ins.mods if m.split("::")[0] in ("global", "shared", "local", "const", "param"))
    base = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}.get(sp, 0)
    x, d = b.src(ins.ops[1], "u64"), b.dst(ins.ops[0], "u64")
    k = u64(base)
    if base == 0:
        return b.emit(ins, d, lambda: x)
    if "to" in ins.mods:
        return b.emit(ins, d, lambda: x - k)
    return b.emit(ins, d, lambda: x + k)


@op("isspacep")
def isspacep(b, ins):
    from .memory import SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW, GLOBAL_BASE

    sp = ins.mods[0].split("::")[0]
    lo, hi = {
        "shared": (SHARED_WINDOW, LOCAL_WINDOW),
        "local": (LOCAL_WINDOW, PARAM_WINDOW),
        "param": (PARAM_WINDOW, GLOBAL_BASE),
        "global": (GLOBAL_BASE, 1 << 63),
        "const": (1 << 62, 1 << 63),
    }[sp]
    x = b.src(ins.ops[1], "u64")
    return b.emit(ins, b.raw(ins.ops[0]), lambda: (x >= u64(lo)) & (x < u64(hi)))
