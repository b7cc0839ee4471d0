"""Warp-level and block-level cooperation: shfl, vote, match, redux, bar.red, ldmatrix, stmatrix."""

from __future__ import annotations
import numpy as np
from .binder import op, unsupported, type_of, VIEW, UINT
from .parser import Reg, Imm, Pair, Vec, Not
from .ops_mem import address, flat_shared, note

i64, u32, u64, u16 = np.int64, np.uint32, np.uint64, np.uint16


def member_mask(b, ins):
    """Operand with the membermask of a .sync instruction, as an array, or None (all lanes)."""
    if ins.op == "bar":
        o = ins.ops[0]
    elif ins.op in ("shfl",):
        o = ins.ops[4] if len(ins.ops) > 4 else None
    elif ins.op in ("vote", "match", "redux", "elect"):
        o = ins.ops[-1]
    else:
        return None
    o = b.const(o)
    if o is None or (isinstance(o, Imm) and o.value & 0xFFFFFFFF == 0xFFFFFFFF):
        return None
    return b.src(o, "u32", full=True)


def lanes_of(b, o, t):
    """Operand with one element per lane."""
    return b.src(o, t, True)


@op("shfl")
def shfl(b, ins):
    dst = ins.ops[0]
    dreg, preg = (dst.a, dst.b) if isinstance(dst, Pair) else (dst, None)
    d = b.dst(dreg, "b32")
    pd = None if preg is None or preg.name == "_" else b.raw(preg)
    x = lanes_of(b, ins.ops[1], "b32")
    bb, cc = b.const(ins.ops[2]), b.const(ins.ops[3])
    mode = next(m for m in ins.mods if m in ("up", "down", "bfly", "idx"))
    T = b.S.T
    lane = np.arange(T) & 31
    warp = np.arange(T) - lane

    def source(bv, cv):
        seg, clamp = (cv >> 8) & 31, cv & 31
        maxl = (lane & seg) | (clamp & ~seg)
        minl = lane & seg
        if mode == "up":
            j = lane - (bv & 31)
            ok = j >= maxl
        elif mode == "down":
            j = lane + (bv & 31)
            ok = j <= maxl
        elif mode == "bfly":
            j = lane ^ (bv & 31)
            ok = j <= maxl
        else:
            j = minl | ((bv & 31) & ~seg)
            ok = j <= maxl
        return warp + np.where(ok, j, lane), ok

    if isinstance(bb, Imm) and isinstance(cc, Imm):
        src, ok = source(bb.value, cc.value)
        if pd is None:
            return b.emit(ins, d, lambda: np.take(x, src))
        return b.emit_multi(ins, [d, pd], lambda: (np.take(x, src), ok))
    bv, cv = b.src(bb, "u32"), b.src(cc, "u32")

    def fn():
        s, k = source(bv.astype(i64), cv.astype(i64))
        return np.take(x, s), k

    return b.emit_multi(ins, [d, pd], fn)


@op("vote")
def vote(b, ins):
    mode = next(m for m in ins.mods if m in ("all", "any", "uni", "ballot"))
    p = b.psrc(ins.ops[1])
    mm = b.src(ins.ops[2], "u32") if len(ins.ops) > 2 else np.array([0xFFFFFFFF], u32)
    S = b.S
    d = b.dst(ins.ops[0], "b32") if mode == "ballot" else b.raw(ins.ops[0])

    def fn():
        act = S.path.m if ins.pred is None else S.path.m & b.pred(ins)()
        v = np.repeat(S.warp_bits(p() & act), 32) & mm
        if mode == "ballot":
            return v
        a = np.repeat(S.warp_bits(act), 32) & mm
        if mode == "any":
            return v != 0
        if mode == "all":
            return v == a
        return (v == a) | (v == 0)

    return b.emit(ins, d, fn)


@op("activemask")
def activemask(b, ins):
    S = b.S
    return b.emit(ins, b.dst(ins.ops[0], "b32"), lambda: np.repeat(S.warp_bits(S.path.m), 32))


@op("match")
def match(b, ins):
    t = type_of(ins)
    dst = ins.ops[0]
    dreg, preg = (dst.a, dst.b) if isinstance(dst, Pair) else (dst, None)
    d = b.dst(dreg, "b32")
    x = lanes_of(b, ins.ops[1], t)
    mm = b.src(ins.ops[2], "u32")
    S = b.S
    bit = u32(1) << np.arange(32, dtype=u32)

    def same():
        v = x.reshape(-1, 32)
        act = S.path.m.reshape(-1, 32)
        eq = (v[:, :, None] == v[:, None, :]) & act[:, None, :]
        return (eq * bit).sum(2, dtype=u64).astype(u32).ravel() & mm

    if "any" in ins.mods:
        return b.emit(ins, d, same)
    pd = None if preg is None or preg.name == "_" else b.raw(preg)

    def allm():
        s = same()
        a = np.repeat(S.warp_bits(S.path.m), 32) & mm
        ok = s == a
        return np.where(ok, a, u32(0)), ok

    return b.emit_multi(ins, [d, pd], allm)


@op("redux")
def redux(b, ins):
    t = type_of(ins)
    k = next(m for m in ins.mods if m in ("add", "min", "max", "and", "or", "xor"))
    x = lanes_of(b, ins.ops[1], t)
    mm = b.src(ins.ops[2], "u32")
    S = b.S
    dt = np.dtype(VIEW[t])
    if dt.kind == "f":
        ident = np.inf if k == "min" else -np.inf
        uf = np.fmin if k == "min" else np.fmax
    else:
        info = np.iinfo(dt)
        ident = {
            "add": 0,
            "or": 0,
            "xor": 0,
            "and": -1 if dt.kind == "i" else info.max,
            "min": info.max,
            "max": info.min,
        }[k]
        uf = {
            "add": np.add,
            "min": np.minimum,
            "max": np.maximum,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "xor": np.bitwise_xor,
        }[k]
    lane = np.arange(32, dtype=u32)

    def fn():
        v = x.reshape(-1, 32)
        act = S.path.m
        m = np.broadcast_to(mm, (S.T,))
        mw = m.reshape(-1, 32)
        out = np.empty((v.shape[0], 32), dt)
        done = np.zeros((v.shape[0], 32), bool)
        while True:  # one turn per distinct mask in a warp
            todo = act.reshape(-1, 32) & ~done
            if not todo.any():
                break
            first = todo.argmax(1)
            mk = mw[np.arange(v.shape[0]), first]
            part = ((mk[:, None] >> lane) & u32(1)).astype(bool) & act.reshape(-1, 32)
            r = uf.reduce(np.where(part, v, dt.type(ident)), axis=1, dtype=dt)
            hit = todo & (mw == mk[:, None])
            out[hit] = np.repeat(r[:, None], 32, 1)[hit]
            done |= hit
        return np.where(done, out, dt.type(0)).ravel()

    return b.emit(ins, b.dst(ins.ops[0], t), fn)


@op("elect")
def elect(b, ins):
    dst = ins.ops[0]
    d = None if not isinstance(dst, Pair) or getattr(dst.a, "name", "_") == "_" else b.dst(dst.a, "b32")
    pd = b.raw(dst.b if isinstance(dst, Pair) else dst)
    S = b.S

    def fn():
        a = S.path.m.reshape(-1, 32)
        first = a.argmax(1)
        lead = np.repeat(first, 32)
        return lead, (np.arange(S.T) & 31) == lead

    return b.emit_multi(ins, [d, pd], fn)


@op("bar", "barrier")
def bar(b, ins):
    """bar.warp.sync only orders memory; block barriers are executed by the scheduler."""
    if "warp" in ins.mods:

        def f(S):
            S.stats.warp_syncs += 1
            w = S.path.m.reshape(-1, 32).any(1)
            S.wepoch[w] += 1

        return f
    if "cluster" in ins.mods:

        def g(S):
            pass

        if b.S.launch.cluster != (1, 1, 1):
            unsupported(ins, "clusters")
        return g
    return lambda S: None


# ---- matrix loads ---------------------------------------------------------------------------------
def _num(ins):
    return next(int(m[1:]) for m in ins.mods if m in ("x1", "x2", "x4"))


@op("ldmatrix")
def ldmatrix(b, ins):
    if "m8n8" not in ins.mods or ins.mods[-1] != "b16":
        unsupported(ins)
    n, trans = _num(ins), "trans" in ins.mods
    ds = [b.dst(o, "b32") for o in (ins.ops[0].items if isinstance(ins.ops[0], Vec) else (ins.ops[0],))]
    addr = address(b, ins.ops[1])
    generic = not any(m.startswith("shared") for m in ins.mods)

    def f(S):
        if ins.pred is not None:
            unsupported(ins, "predicated")
        wl = None
        m = S.path.m
        if not S.full or S.path.n != S.T:
            wsel = m.reshape(-1, 32).all(1)
            wl = np.flatnonzero(wsel)
            lanes = (wl[:, None] * 32 + np.arange(8 * n)).ravel()
        else:
            lanes = np.arange(S.T).reshape(-1, 32)[:, : 8 * n].ravel()
        x = addr(None)[lanes]
        if generic:
            from .memory import SHARED_WINDOW

            x = np.where(x >= SHARED_WINDOW, x - SHARED_WINDOW, x)
        flat = flat_shared(S, x, lanes)
        rows = S.smem.load(S, flat, lanes, 4, 4, ins)  # (W*8n, 4) words
        if S.meter:
            S.stats.shared_access(S, flat, lanes, 16, "load", ins)
        if S.race is not None:
            S.race.access(S, flat, lanes, 16, "load", ins, None)
        w = rows.shape[0] // (8 * n)
        r = rows.reshape(w, n, 8, 4)
        if trans:
            h = np.ascontiguousarray(r).view(u16).reshape(w, n, 8, 8)
            r = np.ascontiguousarray(h.transpose(0, 1, 3, 2)).view(u32)
        r = r.reshape(w, n, 32)
        for k, d in enumerate(ds):
            if wl is None:
                d[:] = r[:, k].reshape(-1)
            else:
                d.reshape(-1, 32)[wl] = r[:, k]

    return f


@op("stmatrix")
def stmatrix(b, ins):
    if "m8n8" not in ins.mods or ins.mods[-1] != "b16":
        unsupported(ins)
    n, trans = _num(ins), "trans" in ins.mods
    xs = [b.src(o, "b32", True) for o in (ins.ops[1].items if isinstance(ins.ops[1], Vec) else (ins.ops[1],))]
    addr = address(b, ins.ops[0])

    def f(S):
        m = S.path.m
        wl = np.flatnonzero(m.reshape(-1, 32).all(1))
        lanes = (wl[:, None] * 32 + np.arange(8 * n)).ravel()
        flat = flat_shared(S, addr(None)[lanes], lanes)
        w = wl.size
        r = np.stack([x.reshape(-1, 32)[wl] for x in xs], 1)
        r = np.ascontiguousarray(r).reshape(w, n, 8, 4)
        if trans:
            h = r.view(u16).reshape(w, n, 8, 8)
            r = np.ascontiguousarray(h.transpose(0, 1, 3, 2)).view(u32)
        vals = r.reshape(w * n * 8, 4)
        note(S, "shared", flat, lanes, 16, "store", ins, vals)
        S.smem.store(S, flat, lanes, 4, 4, vals, ins)

    return f


@op("movmatrix")
def movmatrix(b, ins):
    x = b.src(ins.ops[1], "b32", True)

    def fn():
        h = np.ascontiguousarray(x).view(u16).reshape(-1, 8, 8)
        return np.ascontiguousarray(h.transpose(0, 2, 1)).view(u32).reshape(-1)

    return b.emit(ins, b.dst(ins.ops[0], "b32"), fn)
