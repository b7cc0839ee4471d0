"""atom and red on global and shared memory."""

from __future__ import annotations
import numpy as np
from .binder import op, unsupported, type_of, VIEW, UINT
from .parser import Reg, Imm, Vec, TYPE_SIZE
from .memory import _LG
from .numeric import bf_to_f32, f32_to_bf
from .ops_mem import address, spaces, space_of, note, elements

u16, u32, u64 = np.uint16, np.uint32, np.uint64
f16, f32 = np.float16, np.float32
OPS = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")
_UF = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def combiner(k, t):
    """new = f(old, v, c) on raw unsigned arrays of the storage size."""
    n = TYPE_SIZE[t]
    un = UINT[n]
    if t in ("f16", "f16x2", "bf16", "bf16x2") and k in ("add", "min", "max"):
        uf = {"add": np.add, "min": np.fmin, "max": np.fmax}[k]

        def half(o, v, c):
            o, v = np.ascontiguousarray(o), np.ascontiguousarray(v)
            if t.startswith("f16"):
                with np.errstate(all="ignore"):
                    return uf(o.view(f16).astype(f32), v.view(f16).astype(f32)).astype(f16).view(un)
            return f32_to_bf(uf(bf_to_f32(o.view(u16)), bf_to_f32(v.view(u16)))).view(un)

        return half
    if k == "exch":
        return lambda o, v, c: v
    if k == "cas":
        return lambda o, v, c: np.where(o == v, c, o)
    if k == "inc":
        return lambda o, v, c: np.where(o >= v, un(0), o + un(1))
    if k == "dec":
        return lambda o, v, c: np.where((o == 0) | (o > v), v, o - un(1))
    dt, uf = np.dtype(VIEW[t]), _UF[k]
    if dt.kind == "f" and k != "add":
        uf = {"min": np.fmin, "max": np.fmax}[k]
    return lambda o, v, c: uf(np.ascontiguousarray(o).view(dt), np.ascontiguousarray(v).view(dt)).view(un)


def apply(mem, idx, v, c, k, t, comb, need_old):
    """Perform the atomics one after another per address, in lane order; returns the old values."""
    n = TYPE_SIZE[t]
    dt = np.dtype(VIEW[t])
    packed = t in ("f16", "f16x2", "bf16", "bf16x2")
    plain = k in _UF and not packed and not (dt.kind == "f" and k != "add")
    if idx.size == 0:
        return v
    if not need_old and plain:
        _UF[k].at(mem.view(dt), idx, v.view(dt))
        return None
    order = np.argsort(idx, kind="stable")
    si = idx[order]
    first = np.r_[True, si[1:] != si[:-1]]
    starts = np.flatnonzero(first)
    if starts.size == si.size:  # no address twice
        old = mem[idx]
        mem[idx] = comb(old, v, c)
        return old
    sizes = np.diff(np.r_[starts, si.size])
    group = np.cumsum(first) - 1
    if k == "add" and dt.kind in "iu" and not packed:
        vs = v[order]
        excl = np.cumsum(vs, dtype=vs.dtype) - vs
        o = mem[si] + (excl - excl[starts][group])
        ends = starts + sizes - 1
        mem[si[ends]] = o[ends] + vs[ends]
        old = np.empty_like(o)
        old[order] = o
        return old
    old_s = np.empty(si.size, mem.dtype)
    vs = v[order]
    cs = None if c is None else c[order]
    many = sizes.max()
    if plain and (sizes > 1).sum() < many:
        for g in range(starts.size):  # few addresses with long queues
            a, z = starts[g], starts[g] + sizes[g]
            run = _UF[k].accumulate(np.r_[mem[si[a] : si[a] + 1].view(dt), vs[a:z].view(dt)])
            old_s[a:z] = run[:-1].view(mem.dtype)
            mem[si[a]] = run[-1:].view(mem.dtype)[0]
    else:
        rank = np.arange(si.size) - starts[group]
        by = np.argsort(rank, kind="stable")
        bounds = np.searchsorted(rank[by], np.arange(many + 1))
        for r in range(many):
            q = by[bounds[r] : bounds[r + 1]]
            o = mem[si[q]]
            old_s[q] = o
            mem[si[q]] = comb(o, vs[q], None if cs is None else cs[q])
    old = np.empty_like(old_s)
    old[order] = old_s
    return old


@op("atom", "red")
def atom(b, ins):
    if "async" in ins.mods:
        unsupported(ins)
    k = next((m for m in ins.mods if m in OPS), None)
    t = type_of(ins)
    n = TYPE_SIZE[t]
    if k is None or n == 16:
        unsupported(ins)
    space = space_of(ins)
    isatom = ins.op == "atom"
    ops = list(ins.ops)
    dst = elements(ops.pop(0)) if isatom else []
    addr, active = address(b, ops[0]), b.active(ins)
    items = elements(ops[1])
    vec = len(items)
    bt = {2: "b16", 4: "b32", 8: "b64"}[n]
    vs = [b.src(o, bt, True) for o in items]
    cv = None
    if k == "cas":
        cv = b.src(ops[2], bt, True)
    ds = [b.dst(o, bt) for o in dst]
    need_old = any(d is not None and b.layout.is_read(b.frame, o.name) for d, o in zip(ds, dst))
    comb = combiner(k, t)
    lg = _LG[n]

    def f(S):
        lanes = active(S)
        if lanes is not None and lanes.size == 0:
            return
        x = addr(lanes)
        for sp, flat, ll, sel, name in spaces(S, space, x, lanes):
            size = n * vec
            if np.count_nonzero(flat & (size - 1)):
                sp.misaligned(S, flat, ll, size, ins)
            if np.take(sp.shadow("l", size), flat >> _LG[size], 0 if size > 8 else None, mode="clip").any():
                sp.slow_load(S, flat, ll, size, ins)
            if np.take(sp.shadow("s", size), flat >> _LG[size], 0 if size > 8 else None, mode="clip").any():
                sp.slow_store(S, flat, ll, size, ins)
            note(S, name, flat, ll, size, "atomic", ins)
            mem = sp.rows(n, 1)
            perm = S.launch.atomic_perm(flat.size)
            if S.grace is not None and name == "global":
                al = np.arange(S.T) if ll is None else ll
                S.grace.sync(
                    S, flat if perm is None else flat[perm], al if perm is None else al[perm], "acq_rel", ins.mods
                )
            for j, v in enumerate(vs):
                val = v if ll is None else v[ll]
                c = None if cv is None else (cv if ll is None else cv[ll])
                idx = (flat >> lg) + j
                if perm is None:
                    old = apply(mem, idx, val, c, k, t, comb, need_old)
                else:
                    o = apply(mem, idx[perm], val[perm], None if c is None else c[perm], k, t, comb, need_old)
                    old = None
                    if need_old:
                        old = np.empty_like(o)
                        old[perm] = o
                if need_old and ds[j] is not None:
                    if ll is None:
                        ds[j][:] = old
                    else:
                        ds[j][ll] = old

    return f
