"""Single instructions of ptxrun against references in exact arithmetic (python ints, Fractions).

Every case is a small PTX kernel made here: d = op(a, b, c) over 1024 values with special ones."""

import math
import os
import struct
import sys
from fractions import Fraction as Fr

import numpy as np
import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import ptxrun  # noqa: E402

pytestmark = pytest.mark.slow

N = 1024
rng = np.random.default_rng(11)
SZ = {
    "u16": 2,
    "s16": 2,
    "b16": 2,
    "f16": 2,
    "bf16": 2,
    "u32": 4,
    "s32": 4,
    "b32": 4,
    "f32": 4,
    "u64": 8,
    "s64": 8,
    "b64": 8,
    "f64": 8,
    "f16x2": 4,
    "bf16x2": 4,
    "u8": 1,
    "s8": 1,
    "pred": 4,
}
NP = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def run(op, dt, types, args, text=None):
    """Execute `op d, a, b, c` and return the raw d values (unsigned)."""
    reg = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}
    ls = [
        ".version 8.5",
        ".target sm_90",
        ".address_size 64",
        ".visible .entry k(.param .u64 p0, .param .u64 p1, .param .u64 p2, .param .u64 p3)",
        "{",
        ".reg .pred %p<3>;",
        ".reg .b32 %i<3>;",
        ".reg .b64 %w<9>;",
        f".reg .{reg[SZ[dt]]} d;",
    ]
    for k, t in enumerate(types):
        ls.append(f".reg .{reg[SZ[t]]} {'abc'[k]};")
    ls += ["mov.u32 %i0, %tid.x;", "ld.param.u64 %w0, [p0];", f"mad.wide.u32 %w0, %i0, {SZ[dt]}, %w0;"]
    for k, t in enumerate(types):
        ls += [
            f"ld.param.u64 %w{k + 1}, [p{k + 1}];",
            f"mad.wide.u32 %w{k + 1}, %i0, {SZ[t]}, %w{k + 1};",
            f"ld.global.b{8 * SZ[t]} {'abc'[k]}, [%w{k + 1}];",
        ]
    ls.append(text or f"{op} d, {', '.join('abc'[: len(types)])};")
    ls += [f"st.global.b{8 * SZ[dt]} [%w0], d;", "ret;", "}"]
    d = np.zeros(N, NP[SZ[dt]])
    ptxrun.load("\n".join(ls)).launch("k", 1, N, [ptxrun.Out(d)] + list(args) + [None] * (3 - len(args)))
    return d


def ints(bits, small=False):
    x = rng.integers(0, 1 << bits, N, dtype=np.uint64) if bits < 64 else rng.integers(0, 2**64, N, dtype=np.uint64)
    sp = [0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 255, 256, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    sp = [v & ((1 << bits) - 1) for v in sp]
    x[: len(sp)] = sp
    x[100:400] &= np.uint64(0xFF)
    rng.shuffle(x)
    return x.astype(NP[bits // 8])


def sg(v, bits):
    return v - (1 << bits) if v >> (bits - 1) else v


def check_int(op, dt, types, ref, text=None, n_args=None):
    args = [ints(8 * SZ[t]) for t in types]
    d = run(op, dt, types, args, text)
    m = (1 << 8 * SZ[dt]) - 1
    for k in range(N):
        v = [int(a[k]) for a in args]
        r = ref(*v)
        if r is None:
            continue
        assert int(d[k]) == r & m, (op, [hex(x) for x in v], hex(int(d[k])), hex(r & m))


def tdiv(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def bfe_ref(signed, bits):
    def f(a, b, c):
        pos, ln, msb = b & 255, c & 255, bits - 1
        s = 0 if not signed or ln == 0 else (a >> min(pos + ln - 1, msb)) & 1
        d = 0
        for i in range(bits):
            d |= ((a >> (pos + i)) & 1 if i < ln and pos + i <= msb else s) << i
        return d

    return f


def bfi_ref(bits):
    def f(a, b, pos=None, ln=None):
        d = b
        for i in range(bits):
            if i < ln and pos + i < bits:
                d = (d & ~(1 << (pos + i))) | (((a >> i) & 1) << (pos + i))
        return d

    return f


def prmt_ref(a, b, c):
    by = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    d = 0
    for i in range(4):
        s = (c >> 4 * i) & 15
        v = by[s & 7]
        d |= ((255 if v & 128 else 0) if s & 8 else v) << 8 * i
    return d


INT = [
    ("add.s32", "s32", ["s32"] * 2, lambda a, b: a + b),
    ("sub.u64", "u64", ["u64"] * 2, lambda a, b: a - b),
    ("add.sat.s32", "s32", ["s32"] * 2, lambda a, b: max(-(2**31), min(2**31 - 1, sg(a, 32) + sg(b, 32)))),
    ("sub.sat.s32", "s32", ["s32"] * 2, lambda a, b: max(-(2**31), min(2**31 - 1, sg(a, 32) - sg(b, 32)))),
    ("mul.lo.s64", "s64", ["s64"] * 2, lambda a, b: a * b),
    ("mul.hi.u32", "u32", ["u32"] * 2, lambda a, b: a * b >> 32),
    ("mul.hi.s32", "s32", ["s32"] * 2, lambda a, b: sg(a, 32) * sg(b, 32) >> 32),
    ("mul.hi.u64", "u64", ["u64"] * 2, lambda a, b: a * b >> 64),
    ("mul.hi.s64", "s64", ["s64"] * 2, lambda a, b: sg(a, 64) * sg(b, 64) >> 64),
    ("mul.hi.s16", "s16", ["s16"] * 2, lambda a, b: sg(a, 16) * sg(b, 16) >> 16),
    ("mul.wide.s16", "s32", ["s16"] * 2, lambda a, b: sg(a, 16) * sg(b, 16)),
    ("mul.wide.u32", "u64", ["u32"] * 2, lambda a, b: a * b),
    ("mad.wide.s32", "s64", ["s32", "s32", "s64"], lambda a, b, c: sg(a, 32) * sg(b, 32) + c),
    ("mad.hi.s32", "s32", ["s32"] * 3, lambda a, b, c: (sg(a, 32) * sg(b, 32) >> 32) + c),
    ("mad.lo.u16", "u16", ["u16"] * 3, lambda a, b, c: a * b + c),
    ("mul24.lo.s32", "s32", ["s32"] * 2, lambda a, b: sg(a & 0xFFFFFF, 24) * sg(b & 0xFFFFFF, 24)),
    ("mul24.hi.u32", "u32", ["u32"] * 2, lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> 16),
    ("sad.s32", "s32", ["s32"] * 3, lambda a, b, c: abs(sg(a, 32) - sg(b, 32)) + c),
    ("div.s32", "s32", ["s32"] * 2, lambda a, b: tdiv(sg(a, 32), sg(b, 32)) if b else None),
    ("rem.s64", "s64", ["s64"] * 2, lambda a, b: sg(a, 64) - sg(b, 64) * tdiv(sg(a, 64), sg(b, 64)) if b else None),
    ("div.u64", "u64", ["u64"] * 2, lambda a, b: a // b if b else None),
    ("rem.u32", "u32", ["u32"] * 2, lambda a, b: a % b if b else None),
    ("min.s16", "s16", ["s16"] * 2, lambda a, b: min(sg(a, 16), sg(b, 16))),
    ("max.u64", "u64", ["u64"] * 2, max),
    ("abs.s32", "s32", ["s32"], lambda a: abs(sg(a, 32))),
    ("neg.s64", "s64", ["s64"], lambda a: -a),
    ("shl.b32", "b32", ["b32", "u32"], lambda a, b: a << min(b, 32)),
    ("shr.u32", "u32", ["u32", "u32"], lambda a, b: a >> min(b, 32)),
    ("shr.s32", "s32", ["s32", "u32"], lambda a, b: sg(a, 32) >> min(b, 32)),
    ("shr.s64", "s64", ["s64", "u32"], lambda a, b: sg(a, 64) >> min(b, 64)),
    ("shl.b16", "b16", ["b16", "u32"], lambda a, b: a << min(b, 16)),
    ("shr.s16", "s16", ["s16", "u32"], lambda a, b: sg(a, 16) >> min(b, 16)),
    ("shf.l.wrap.b32", "b32", ["b32", "b32", "u32"], lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32),
    ("shf.r.wrap.b32", "b32", ["b32", "b32", "u32"], lambda a, b, c: (b << 32 | a) >> (c & 31)),
    ("shf.l.clamp.b32", "b32", ["b32", "b32", "u32"], lambda a, b, c: ((b << 32 | a) << min(c, 32)) >> 32),
    ("shf.r.clamp.b32", "b32", ["b32", "b32", "u32"], lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    ("bfe.u32", "u32", ["u32"] * 3, bfe_ref(False, 32)),
    ("bfe.s32", "s32", ["s32", "u32", "u32"], bfe_ref(True, 32)),
    ("bfe.u64", "u64", ["u64", "u32", "u32"], bfe_ref(False, 64)),
    ("bfe.s64", "s64", ["s64", "u32", "u32"], bfe_ref(True, 64)),
    ("prmt.b32", "b32", ["b32"] * 3, prmt_ref),
    ("popc.b64", "u32", ["b64"], lambda a: bin(a).count("1")),
    ("clz.b32", "u32", ["b32"], lambda a: 32 - a.bit_length()),
    ("clz.b64", "u32", ["b64"], lambda a: 64 - a.bit_length()),
    ("brev.b64", "b64", ["b64"], lambda a: int(f"{a:064b}"[::-1], 2)),
    ("bfind.u32", "u32", ["u32"], lambda a: a.bit_length() - 1),
    ("bfind.s64", "u32", ["s64"], lambda a: (a if sg(a, 64) >= 0 else ~sg(a, 64)).bit_length() - 1),
    ("bfind.shiftamt.u32", "u32", ["u32"], lambda a: 32 - a.bit_length() if a else -1),
    ("slct.s32.s32", "s32", ["s32"] * 3, lambda a, b, c: a if sg(c, 32) >= 0 else b),
    ("cnot.b32", "b32", ["b32"], lambda a: int(a == 0)),
    ("not.b16", "b16", ["b16"], lambda a: ~a),
    ("set.lt.u32.s32", "u32", ["s32"] * 2, lambda a, b: -(sg(a, 32) < sg(b, 32))),
    (
        "dp4a.s32.u32",
        "s32",
        ["s32", "u32", "s32"],
        lambda a, b, c: sum(sg((a >> 8 * i) & 255, 8) * ((b >> 8 * i) & 255) for i in range(4)) + c,
    ),
    (
        "dp2a.hi.s32.s32",
        "s32",
        ["s32"] * 3,
        lambda a, b, c: sum(sg((a >> 16 * i) & 65535, 16) * sg((b >> (16 + 8 * i)) & 255, 8) for i in range(2)) + c,
    ),
    ("cvt.s8.s32", "s32", ["s32"], lambda a: sg(a & 255, 8)),
    ("cvt.u16.s32", "u16", ["s32"], lambda a: a),
    ("cvt.sat.s8.s32", "s32", ["s32"], lambda a: max(-128, min(127, sg(a, 32)))),
    ("cvt.sat.u16.s64", "u16", ["s64"], lambda a: max(0, min(65535, sg(a, 64)))),
    ("cvt.sat.u8.u32", "u32", ["u32"], lambda a: min(255, a)),
    ("cvt.s64.s16", "s64", ["s16"], lambda a: sg(a, 16)),
    ("cvt.u64.u8", "u64", ["u16"], lambda a: a & 255),
    ("bmsk.clamp.b32", "b32", ["b32"] * 2, lambda a, b: ((1 << min(b, 32)) - 1) << min(a, 32)),
    (
        "min.s16x2",
        "b32",
        ["b32"] * 2,
        lambda a, b: sum((min(sg((a >> s) & 65535, 16), sg((b >> s) & 65535, 16)) & 65535) << s for s in (0, 16)),
    ),
    (
        "cvt.pack.sat.u8.s32.b32",
        "b32",
        ["s32", "s32", "b32"],
        lambda a, b, c: c << 16 | max(0, min(255, sg(a, 32))) << 8 | max(0, min(255, sg(b, 32))),
    ),
]


@pytest.mark.parametrize("case", INT, ids=lambda c: c[0])
def test_int(case):
    check_int(*case)


@pytest.mark.parametrize("pos,ln", [(0, 8), (5, 7), (24, 20), (31, 1), (40, 3), (3, 0), (0, 255)])
def test_bfi(pos, ln):
    check_int("bfi", "b32", ["b32"] * 2, lambda a, b: bfi_ref(32)(a, b, pos, ln), text=f"bfi.b32 d, a, b, {pos}, {ln};")
    check_int("bfi", "b64", ["b64"] * 2, lambda a, b: bfi_ref(64)(a, b, pos, ln), text=f"bfi.b64 d, a, b, {pos}, {ln};")
    check_int("bfe", "u32", ["u32"], lambda a: bfe_ref(False, 32)(a, pos, ln), text=f"bfe.u32 d, a, {pos}, {ln};")


@pytest.mark.parametrize("lut", [0x96, 0xE8, 0xCA, 0x1B, 0x40, 0xB8, 0x00, 0xFF, 0x7F])
def test_lop3(lut):
    def ref(a, b, c):
        return sum(((lut >> (((a >> i) & 1) * 4 + ((b >> i) & 1) * 2 + ((c >> i) & 1))) & 1) << i for i in range(32))

    check_int("lop3", "b32", ["b32"] * 3, ref, text=f"lop3.b32 d, a, b, c, {lut};")


@pytest.mark.parametrize("mode", ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"])
def test_prmt_modes(mode):
    sel = {
        "f4e": lambda s, i: s + i,
        "b4e": lambda s, i: (s - i) & 7,
        "rc8": lambda s, i: s,
        "ecl": lambda s, i: max(i, s),
        "ecr": lambda s, i: min(i, s),
        "rc16": lambda s, i: (s & 1) * 2 + (i & 1),
    }[mode]

    def ref(a, b, c):
        by = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
        return sum(by[sel(c & 3, i)] << 8 * i for i in range(4))

    check_int("prmt", "b32", ["b32"] * 3, ref, text=f"prmt.b32.{mode} d, a, b, c;")


def test_carry_chain():
    text = """{ .reg .b32 al, ah, bl, bh, cl, ch; mov.b64 {al, ah}, a; mov.b64 {bl, bh}, b;
    %s.cc.u32 cl, al, bl; %sc.u32 ch, ah, bh; mov.b64 d, {cl, ch}; }"""
    check_int("add", "u64", ["u64"] * 2, lambda a, b: a + b, text=text % ("add", "add"))
    check_int("sub", "u64", ["u64"] * 2, lambda a, b: a - b, text=text % ("sub", "sub"))
    mad = """{ .reg .b32 al, ah, bl, bh, c0, c1, c2, c3; mov.b64 {al, ah}, a; mov.b64 {bl, bh}, b;
    mul.lo.u32 c0, al, bl; mul.hi.u32 c1, al, bl; mad.lo.cc.u32 c1, al, bh, c1; madc.hi.u32 c2, al, bh, 0;
    mad.lo.cc.u32 c1, ah, bl, c1; madc.hi.cc.u32 c2, ah, bl, c2; addc.u32 c3, 0, 0; mad.lo.cc.u32 c2, ah, bh, c2;
    madc.hi.u32 c3, ah, bh, c3; mov.b64 d, {c2, c3}; }"""
    check_int("mulhi64", "u64", ["u64"] * 2, lambda a, b: a * b >> 64, text=mad)


@pytest.mark.parametrize(
    "cmp", ["eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
)
def test_setp_f32(cmp):
    a, b = floats("f32"), floats("f32")
    b[::3] = a[::3]
    d = run("", "u32", ["f32", "f32"], [a, b], text=f"setp.{cmp}.f32 %p0, a, b; selp.u32 d, 1, 0, %p0;")
    x, y = a.view(np.float32), b.view(np.float32)
    nan = np.isnan(x) | np.isnan(y)
    base = {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}
    ref = nan if cmp == "nan" else ~nan if cmp == "num" else base[cmp] & ~nan if cmp in base else base[cmp[:2]] | nan
    assert (d == ref).all()


def test_setp_bool_and_pair():
    a, b = ints(32), ints(32)
    d = run(
        "",
        "u32",
        ["s32", "s32"],
        [a, b],
        text="""setp.gt.u32 %p2, a, 100; setp.lt.and.s32 %p0|%p1, a, b, %p2;
      { .reg .b32 t; selp.u32 d, 1, 0, %p0; selp.u32 t, 2, 0, %p1; or.b32 d, d, t; @!%p2 add.u32 d, d, 8; }""",
    )
    x, y, q = a.view(np.int32), b.view(np.int32), a > 100
    assert (d == ((x < y) & q) + 2 * (~(x < y) & q) + 8 * ~q).all()


# ---- floats in exact arithmetic ----------------------------------------------------------------------
FMT = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def floats(t, wild=True):
    bits = 8 * SZ[t]
    p, emin, emax = FMT[t]
    x = rng.standard_normal(N) * 2.0 ** rng.integers(max(emin, -60), min(emax, 60) - 2, N)
    x[:300] = rng.standard_normal(300)
    u = np.array([enc(Fr(float(v)), t, "rn") for v in x], dtype=np.uint64)
    if wild:
        e = bits - p
        sp = [
            0,
            1 << (bits - 1),
            1,
            5,
            (1 << (p - 1)) - 1,
            1 << (p - 1),
            ((1 << e) - 1) << (p - 1),
            (((1 << e) - 1) << (p - 1)) - 1,
            (((1 << e) - 1) << (p - 1)) | 1 << (p - 2),
        ]
        sp += [v | 1 << (bits - 1) for v in sp]
        u[: len(sp)] = sp
        u[50:90] = rng.integers(0, 1 << (p - 1), 40)  # subnormals
        u[90:130] = rng.integers(0, 1 << (bits - 1), 40) if bits < 64 else rng.integers(0, 2**62, 40)
    rng.shuffle(u)
    return u.astype(NP[SZ[t]])


def dec(u, t):
    """Raw bits -> Fraction, or 'nan', or (+-inf as float)."""
    p, emin, emax = FMT[t]
    bits = 8 * SZ[t]
    s, e, m = u >> (bits - 1), (u >> (p - 1)) & ((1 << (bits - p)) - 1), u & ((1 << (p - 1)) - 1)
    if e == (1 << (bits - p)) - 1:
        return "nan" if m else (-math.inf if s else math.inf)
    v = Fr(m, 1 << (p - 1)) * Fr(2) ** emin if e == 0 else (1 + Fr(m, 1 << (p - 1))) * Fr(2) ** (e + emin - 1)
    return -v if s else v


def enc(x, t, mode, zneg=False):
    """Correctly rounded Fraction -> raw bits."""
    p, emin, emax = FMT[t]
    bits = 8 * SZ[t]
    if x == 0:
        return (1 << (bits - 1)) if zneg else 0
    s, a = x < 0, abs(x)
    e = a.numerator.bit_length() - a.denominator.bit_length()
    if Fr(2) ** e > a:
        e -= 1
    e = max(e, emin)
    q = Fr(2) ** (e - p + 1)
    n, r = divmod(a, q)
    n = int(n)
    up = {
        "rn": r * 2 > q or (r * 2 == q and n & 1),
        "rz": False,
        "rm": s and r > 0,
        "rp": not s and r > 0,
        "rna": r * 2 >= q,
    }[mode]
    n += up
    top = Fr(2) ** emax * (2 - Fr(1, 1 << (p - 1)))
    if n * q > top:
        big = {"rn": True, "rna": True, "rz": False, "rm": s, "rp": not s}[mode]
        m = ((1 << (bits - p)) - 1) << (p - 1)
        return (m if big else m - 1) | (s << (bits - 1))
    if n < 1 << (p - 1):
        return n | (s << (bits - 1))
    if n == 1 << p:
        n, e = n >> 1, e + 1
    return (n - (1 << (p - 1))) | (e - emin + 1) << (p - 1) | (s << (bits - 1))


def check_float(op, t, nargs, ref, mode="rn", dt=None, wild=True, args=None, text=None):
    args = args or [floats(t, wild) for _ in range(nargs)]
    dt = dt or t
    d = run(op, dt, [t] * nargs, args, text)
    bad = 0
    for k in range(N):
        raw = [int(a[k]) for a in args]
        v = [dec(r, t) for r in raw]
        if any(isinstance(x, (str, float)) for x in v):
            continue
        r = ref(*v)
        if r is None:
            continue
        got = int(d[k])
        want = enc(r, dt, mode)
        if r == 0:
            assert got & ((1 << (8 * SZ[dt] - 1)) - 1) == 0, (op, [hex(x) for x in raw], hex(got))
            continue
        assert got == want, (op, [hex(x) for x in raw], hex(got), hex(want))


def near_cancel(t):
    """fma operands with heavy cancellation and halfway cases."""
    p = FMT[t][0]
    a, b = floats(t, False), floats(t, False)
    c = np.empty_like(a)
    for k in range(N):
        x = dec(int(a[k]), t) * dec(int(b[k]), t)
        e = enc(-x if k % 3 else x * Fr(2) ** int(rng.integers(-p - 2, p + 2)), t, "rn")
        c[k] = e
    m1, m2 = {"f32": (12, 12), "bf16": (4, 4), "f64": (26, 27), "f16": (5, 6)}[t]
    for k in range(300):  # a*b on a tie of the format, c decides it
        x, y = (Fr(2 * int(rng.integers(0, 6 if t != "bf16" else 3)) + 1, 2**m) + 1 for m in (m1, m2))
        a[k], b[k] = enc(x, t, "rn"), enc(y, t, "rn")
        c[k] = enc(Fr(1 if k & 1 else -1) / 2 ** (24 if t == "f16" else 60 + k % 40 if t != "f64" else 120), t, "rn")
    return [a, b, c]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("t", ["f32", "f64"])
def test_float_arith(t, mode):
    check_float(f"add.{mode}.{t}", t, 2, lambda a, b: a + b, mode)
    check_float(f"sub.{mode}.{t}", t, 2, lambda a, b: a - b, mode)
    lim = Fr(2) ** (-960)  # f64 products below this lose their error term
    check_float(
        f"mul.{mode}.{t}",
        t,
        2,
        lambda a, b: a * b if t == "f32" or mode == "rn" or abs(a * b) > lim or a * b == 0 else None,
        mode,
        wild=t == "f32",
    )
    check_float(
        f"div.{mode}.{t}",
        t,
        2,
        lambda a, b: (
            (a / b if t == "f32" or mode == "rn" or (lim < abs(a / b) < 1 / lim) or a == 0 else None) if b else None
        ),
        mode,
        wild=t == "f32",
    )


# Directed rounding of fma in f64 is off by up to one ulp (README.md).
@pytest.mark.parametrize(("t", "mode"), [*(("f32", mode) for mode in ("rn", "rz", "rm", "rp")), ("f64", "rn")])
def test_fma(t, mode):
    f = lambda a, b, c: a * b + c if t == "f32" or abs(a * b) > Fr(2) ** -900 else None
    check_float(f"fma.{mode}.{t}", t, 3, f, mode, wild=False)
    check_float(f"fma.{mode}.{t}", t, 3, f, mode, args=near_cancel(t))


@pytest.mark.parametrize("t", ["f16", "bf16"])
def test_half_arith(t):
    check_float(f"add.rn.{t}", t, 2, lambda a, b: a + b)
    check_float(f"sub.rn.{t}", t, 2, lambda a, b: a - b)
    check_float(f"mul.rn.{t}", t, 2, lambda a, b: a * b)
    check_float(f"fma.rn.{t}", t, 3, lambda a, b, c: a * b + c)
    check_float(f"fma.rn.{t}", t, 3, lambda a, b, c: a * b + c, args=near_cancel(t))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_sqrt_rcp(mode):
    def isq(a):
        if a < 0:
            return None
        # enough bits of the root; the sticky bit decides inexactness
        k = 200
        n = math.isqrt(int(a * Fr(4) ** k))
        r = Fr(n, 2**k)
        return r if r * r == a else r + Fr(1, 2 ** (k + 60))

    check_float(f"sqrt.{mode}.f32", "f32", 1, isq, mode)
    check_float(f"rcp.{mode}.f32", "f32", 1, lambda a: 1 / a if a else None, mode)
    check_float(f"rcp.{mode}.f64", "f64", 1, lambda a: 1 / a if a else None, mode, wild=False)


# PTX converts to bf16 only so.
@pytest.mark.parametrize(
    ("dt", "mode"), [*(("f16", mode) for mode in ("rn", "rz", "rm", "rp")), ("bf16", "rn"), ("bf16", "rz")]
)
def test_cvt_narrow(dt, mode):
    a = floats("f32")
    a[500:700] = (rng.standard_normal(200) * 2.0 ** rng.integers(-26, -10, 200)).astype(np.float32).view(np.uint32)
    a[700:800] = (a[700:800] & np.uint32(0xFFFF0000)) | np.uint32(0x8000)
    a[800:900] = (a[800:900] & np.uint32(0xFFFFE000)) | np.uint32(0x1000)
    check_float(f"cvt.{mode}.{dt}.f32", "f32", 1, lambda x: x, mode, dt=dt, args=[a])
    if mode in ("rn", "rz"):
        d = run("", "b32", ["f32", "f32"], [a, a[::-1].copy()], text=f"cvt.{mode}.{dt}x2.f32 d, a, b;")
        one = run(f"cvt.{mode}.{dt}.f32", dt, ["f32"], [a])
        assert (d >> 16 == one).all() and ((d & 0xFFFF) == one[::-1]).all()
    if dt == "f16":
        check_float(f"cvt.{mode}.f16.f64", "f64", 1, lambda x: x, mode, dt="f16", wild=False)
    check_float(f"cvt.{mode}.f32.f64", "f64", 1, lambda x: x, mode, dt="f32", wild=False)


@pytest.mark.parametrize("st", ["f32", "f64", "f16"])
@pytest.mark.parametrize("dt", ["s32", "u32", "s64", "u64", "s16", "u8"])
@pytest.mark.parametrize("mode", ["rni", "rzi", "rmi", "rpi"])
def test_cvt_float_int(st, dt, mode):
    a = floats(st)
    a[:40] = [enc(Fr(k, 2), st, "rn") for k in range(-20, 20)]
    d = run(f"cvt.{mode}.{dt}.{st}", dt if dt != "u8" else "u32", [st], [a])
    bits = 8 * SZ[dt]
    lo, hi = (-(1 << bits - 1), (1 << bits - 1) - 1) if dt[0] == "s" else (0, (1 << bits) - 1)
    for k in range(N):
        v = dec(int(a[k]), st)
        if v == "nan":
            r = 0
        elif isinstance(v, float):
            r = hi if v > 0 else lo
        else:
            r = {"rni": round, "rzi": int, "rmi": math.floor, "rpi": math.ceil}[mode](v)
            r = max(lo, min(hi, r))
        m = (1 << max(bits, 16 if dt[1:] == "16" else 32 if dt == "u8" else bits)) - 1
        assert int(d[k]) == r & m, (dt, st, mode, hex(int(a[k])), hex(int(d[k])), r)


@pytest.mark.parametrize("st", ["s32", "u32", "s64", "u64", "s16"])
@pytest.mark.parametrize("dt", ["f32", "f64", "f16"])
@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_cvt_int_float(st, dt, mode):
    a = ints(8 * SZ[st])
    if st.endswith("64"):
        a[:200] = (np.uint64(1) << rng.integers(24, 62, 200).astype(np.uint64)) + rng.integers(0, 3, 200).astype(
            np.uint64
        )
    d = run(f"cvt.{mode}.{dt}.{st}", dt, [st], [a])
    for k in range(N):
        v = int(a[k])
        if st[0] == "s":
            v = sg(v, 8 * SZ[st])
        assert int(d[k]) == enc(Fr(v), dt, mode), (st, dt, mode, v, hex(int(d[k])))


def test_tf32_rna():
    a = floats("f32")
    a[:300] = (a[:300] & np.uint32(0xFFFFE000)) | np.uint32(0x1000)
    d = run("cvt.rna.tf32.f32", "b32", ["f32"], [a])
    for x, y in zip(a, d):
        v = dec(int(x), "f32")
        if isinstance(v, Fr) and v:
            p, e = 11, None
            u = int(x) & 0x7FFFFFFF
            r = (u + 0x1000) & 0x7FFFE000
            assert int(y) & 0x7FFFFFFF == r


# f64 has no .NaN forms.
@pytest.mark.parametrize(
    ("t", "op"),
    [
        *((t, op) for t in ("f32", "f16", "bf16") for op in ("min", "max", "min.NaN", "max.NaN")),
        *(("f64", op) for op in ("min", "max")),
    ],
)
def test_minmax(t, op):
    a, b = floats(t), floats(t)
    b[::4] = a[::4]
    bits = 8 * SZ[t]
    sgn = 1 << (bits - 1)
    a[1], b[1], a[2], b[2] = 0, sgn, sgn, 0
    d = run(f"{op}.{t}", t, [t, t], [a, b])
    for k in range(N):
        x, y = int(a[k]), int(b[k])
        nx, ny = dec(x, t) == "nan", dec(y, t) == "nan"
        if nx or ny:
            if "NaN" in op or (nx and ny):
                assert dec(int(d[k]), t) == "nan"
            else:
                assert int(d[k]) == (y if nx else x)
            continue
        key = lambda u: (u ^ ((1 << bits) - 1)) if u & sgn else u | sgn  # total order, -0 < +0
        r = min(x, y, key=key) if op.startswith("min") else max(x, y, key=key)
        assert int(d[k]) == r, (op, t, hex(x), hex(y), hex(int(d[k])))


def test_ftz_sat_abs_neg():
    a, b = floats("f32"), floats("f32")
    x, y = a.view(np.float32).astype(np.float64), b.view(np.float32).astype(np.float64)
    tiny = 2.0**-126
    fx, fy = np.where(np.abs(x) < tiny, 0, x), np.where(np.abs(y) < tiny, 0, y)
    with np.errstate(all="ignore"):
        s = (fx + fy).astype(np.float32)
    s = np.where(np.abs(s) < tiny, 0, s)
    d = run("add.ftz.f32", "f32", ["f32", "f32"], [a, b]).view(np.float32)
    ok = (d == s) | (np.isnan(d) & np.isnan(s))
    assert ok.all()
    d = run("add.sat.f32", "f32", ["f32", "f32"], [a, b]).view(np.float32)
    with np.errstate(all="ignore"):
        r = (x + y).astype(np.float32)
    assert (d == np.where(np.isnan(r), 0, np.clip(r, 0, 1))).all()
    assert (run("neg.f32", "f32", ["f32"], [a]) == a ^ np.uint32(1 << 31)).all()
    assert (run("abs.f32", "f32", ["f32"], [a]) == a & np.uint32(0x7FFFFFFF)).all()


@pytest.mark.parametrize(
    "op,fn,tol",
    [
        ("ex2.approx.f32", np.exp2, 1e-7),
        ("lg2.approx.f32", np.log2, 1e-7),
        ("sin.approx.f32", np.sin, 1e-7),
        ("cos.approx.f32", np.cos, 1e-7),
        ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x), 1e-7),
        ("tanh.approx.f32", np.tanh, 1e-7),
        ("rcp.approx.f32", lambda x: 1 / x, 1e-7),
        ("sqrt.approx.f32", np.sqrt, 1e-7),
    ],
)
def test_special(op, fn, tol):
    x = np.abs(rng.standard_normal(N).astype(np.float32)) * 3 + np.float32(0.01)
    d = run(op, "f32", ["f32"], [x.view(np.uint32)]).view(np.float32)
    r = fn(x.astype(np.float64))
    assert (np.abs(d - r) <= tol * np.maximum(np.abs(r), 1e-3)).all()


def test_fp8_roundtrip():
    a = (rng.standard_normal(N) * 2.0 ** rng.integers(-10, 8, N)).astype(np.float32)
    import torch

    d = run(
        "",
        "b16",
        ["f32", "f32"],
        [a.view(np.uint32), a[::-1].copy().view(np.uint32)],
        text="cvt.rn.satfinite.e4m3x2.f32 d, a, b;",
    )
    ref = torch.from_numpy(np.clip(a, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert (d >> 8 == ref).all() and ((d & 255) == ref[::-1]).all()
