"""Loads, stores, cp.async and fences."""

from __future__ import annotations
import numpy as np
from .binder import op, unsupported, type_of, VIEW, UINT, SINT
from .parser import Reg, Imm, Sym, Vec, Addr, TYPE_SIZE
from .memory import SHARED_WINDOW, LOCAL_WINDOW, PARAM_WINDOW, GLOBAL_BASE, ALLOC, INIT, LOADED, STORED, INFLIGHT
from .errors import LaunchError, CheckError, Finding

i64, u64, u32, u8 = np.int64, np.uint64, np.uint32, np.uint8
SPACES = ("global", "shared", "local", "param", "const", "generic")


def space_of(ins):
    for m in ins.mods:
        s = m.split("::")[0]
        if s in SPACES:
            return s
    return "generic"


def address(b, o, narrow_ok=True):
    """Address operand -> function (lanes) giving int64 addresses (not yet made flat)."""
    T = b.S.T
    if isinstance(o, Addr) and isinstance(o.base, Reg):
        a = b.raw(o.base)
        off = o.off
        if a.dtype == np.uint64:
            a = a.view(i64)
            if off == 0:
                return lambda lanes: a if lanes is None else a[lanes]
            return lambda lanes: (a if lanes is None else a[lanes]) + off
        return lambda lanes: (a if lanes is None else a[lanes]).astype(i64) + off
    if isinstance(o, Addr):
        v = o.off + (o.base.value if isinstance(o.base, Imm) else b.layout.address(o.base.name, b.frame) + o.base.off)
        c = np.full(T, v, i64)
        return lambda lanes: c if lanes is None else c[: lanes.size]
    raise LaunchError(f"address operand {o!r}")


def flat_shared(S, x, lanes):
    base = S.sh_base if lanes is None else S.sh_base[lanes]
    return np.minimum(x.view(u64), u64(S.sh_guard)).view(i64) + base


def flat_local(S, x, lanes):
    base = S.lo_base if lanes is None else S.lo_base[lanes]
    return np.minimum(x.view(u64), u64(S.lo_guard)).view(i64) + base


def spaces(S, space, x, lanes):
    """Split an access by space: yields (Space, flat, lanes, selection or None, window name)."""
    if space == "global" or space == "const":
        return ((S.gmem, x - GLOBAL_BASE, lanes, None, "global"),)
    if space == "shared":
        return ((S.smem, flat_shared(S, x, lanes), lanes, None, "shared"),)
    if space == "local":
        return ((S.lmem, flat_local(S, x, lanes), lanes, None, "local"),)
    # generic
    if x.size == 0 or x.min() >= GLOBAL_BASE:
        return ((S.gmem, x - GLOBAL_BASE, lanes, None, "global"),)
    out = []
    all_lanes = np.arange(S.T) if lanes is None else lanes
    for name, lo, hi in (
        ("shared", SHARED_WINDOW, LOCAL_WINDOW),
        ("local", LOCAL_WINDOW, PARAM_WINDOW),
        ("global", None, None),
    ):
        sel = ((x >= lo) & (x < hi)) if lo is not None else ((x < SHARED_WINDOW) | (x >= PARAM_WINDOW))
        if not sel.any():
            continue
        k = np.flatnonzero(sel)
        ll = all_lanes[k]
        if name == "shared":
            out.append((S.smem, flat_shared(S, x[k] - SHARED_WINDOW, ll), ll, k, name))
        elif name == "local":
            out.append((S.lmem, flat_local(S, x[k] - LOCAL_WINDOW, ll), ll, k, name))
        else:
            out.append((S.gmem, x[k] - GLOBAL_BASE, ll, k, name))
    return out


def note(S, name, flat, lanes, size, kind, ins, vals=None):
    """Metering and race detection of one access."""
    if S.meter:
        if name == "global":
            S.stats.global_access(S, flat, lanes, size, kind, ins)
        elif name == "shared":
            S.stats.shared_access(S, flat, lanes, size, kind, ins)
        else:
            S.stats.local_bytes += flat.size * size
    if name == "shared":
        if S.race is not None:
            S.race.access(S, flat, lanes, size, kind, ins, vals)
    elif name == "global" and S.grace is not None:
        if SYNC.isdisjoint(ins.mods) or kind == "atomic":
            S.grace.access(S, flat, lanes, size, kind, ins, vals)
        else:
            S.grace.sync(S, flat, lanes, "acquire" if kind == "load" else "release", ins.mods)


def do_load(S, space, x, lanes, es, vec, ins):
    """Checked load; returns raw unsigned values, shape (n,) or (n, vec)."""
    parts = spaces(S, space, x, lanes)
    if len(parts) == 1 and parts[0][3] is None:
        sp, flat, lanes, _, name = parts[0]
        v = sp.load(S, flat, lanes, es, vec, ins)
        note(S, name, flat, lanes, es * vec, "load", ins)
        return v
    out = np.zeros((x.size, vec) if vec > 1 else x.size, UINT[es])
    for sp, flat, ll, k, name in parts:
        out[k] = sp.load(S, flat, ll, es, vec, ins)
        note(S, name, flat, ll, es * vec, "load", ins)
    return out


def do_store(S, space, x, lanes, es, vec, vals, ins):
    for sp, flat, ll, k, name in spaces(S, space, x, lanes):
        v = vals if k is None else vals[k]
        note(S, name, flat, ll, es * vec, "store", ins, v)
        sp.store(S, flat, ll, es, vec, v, ins)


def elements(o):
    return list(o.items) if isinstance(o, Vec) else [o]


SYNC = {"acquire", "release", "volatile", "relaxed", "mmio", "acq_rel", "sc"}


@op("ld", "ldu")
def ld(b, ins):
    t = type_of(ins)
    space = space_of(ins)
    items = elements(ins.ops[0])
    vec = len(items)
    if space == "param":
        return ld_param(b, ins, t, items)
    es = TYPE_SIZE[t]
    if es == 16:
        unsupported(ins)
    signed = t[0] == "s"
    ds = [b.dst(o, t) for o in items]
    ds = [None if d is None else (d.view(UINT[d.dtype.itemsize]) if d.dtype.kind == "f" else d) for d in ds]
    sv = SINT[es]
    addr, active = address(b, ins.ops[1]), b.active(ins)

    def f(S):
        lanes = active(S)
        if lanes is not None and lanes.size == 0:
            return
        x = addr(lanes)
        v = do_load(S, space, x, lanes, es, vec, ins)
        if signed:
            v = v.view(sv)
        if vec == 1:
            d = ds[0]
            if d is not None:
                if lanes is None:
                    np.copyto(d, v, "unsafe")
                else:
                    d[lanes] = v
            return
        for k, d in enumerate(ds):
            if d is not None:
                if lanes is None:
                    np.copyto(d, v[:, k], "unsafe")
                else:
                    d[lanes] = v[:, k]

    return f


def ld_param(b, ins, t, items):
    o = ins.ops[1]
    es = TYPE_SIZE[t]
    ds = [b.dst(x, t) for x in items]
    dt = np.dtype(VIEW[t])
    if isinstance(o.base, Sym):
        buf = b.layout.param(o.base.name, b.frame)
        off = o.off + o.base.off
        if buf.ndim == 2:  # call parameter: per lane
            vs = [buf[:, off + k * es : off + (k + 1) * es].view(dt)[:, 0] for k in range(len(ds))]
            return b.emit_multi(ins, ds, lambda: vs)
        if off + es * len(ds) > buf.size:
            raise LaunchError(f"PTX line {ins.line}: `{ins.text}` reads beyond the parameter")
        vs = [buf[off + k * es : off + (k + 1) * es].view(dt) for k in range(len(ds))]
        return b.emit_multi(ins, ds, lambda: vs)
    addr, active = address(b, o), b.active(ins)
    pb = b.layout.param_bytes
    n = es * len(ds)

    def f(S):  # indexed by a register
        lanes = active(S)
        x = addr(lanes)
        x = np.where(x >= PARAM_WINDOW, x - PARAM_WINDOW, x)
        bad = (x < 0) | (x + n > pb.size) | (x % es != 0)
        if bad.any():
            k = int(np.flatnonzero(bad)[0])
            lane = k if lanes is None else int(lanes[k])
            block, thread = S.where(lane)
            raise CheckError(
                Finding(
                    "oob", "load outside the kernel parameters", ins.line, ins.text, ins.src, block, thread, int(x[k])
                )
            )
        for k, d in enumerate(ds):
            by = pb[x[:, None] + np.arange(k * es, (k + 1) * es)]
            v = np.ascontiguousarray(by).view(dt)[:, 0]
            if lanes is None:
                np.copyto(d, v, "unsafe")
            else:
                d[lanes] = v

    return f


def values(b, items, es):
    """Store operands -> function (lanes) giving raw unsigned values (n,) or (n, vec)."""
    T = b.S.T
    t = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}[es]
    xs = [b.src(o, t, True) for o in items]
    if len(xs) == 1:
        x = xs[0]
        return lambda lanes: x if lanes is None else x[lanes]

    def f(lanes):
        n = T if lanes is None else lanes.size
        r = np.empty((n, len(xs)), UINT[es])
        for k, x in enumerate(xs):
            r[:, k] = x if lanes is None else x[lanes]
        return r

    return f


@op("st")
def st(b, ins):
    if "async" in ins.mods or "bulk" in ins.mods:
        unsupported(ins)
    t = type_of(ins)
    space = space_of(ins)
    items = elements(ins.ops[1])
    vec = len(items)
    es = TYPE_SIZE[t]
    if es == 16:
        unsupported(ins)
    if space == "param":
        o = ins.ops[0]
        buf = b.layout.param(o.base.name, b.frame)
        off = o.off + o.base.off
        bt = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}[es]
        ds = [buf[:, off + k * es : off + (k + 1) * es].view(UINT[es])[:, 0] for k in range(vec)]
        xs = [b.src(x, bt) for x in items]
        return b.emit_multi(ins, ds, lambda: xs)
    vals = values(b, items, es)
    addr, active = address(b, ins.ops[0]), b.active(ins)

    def f(S):
        lanes = active(S)
        if lanes is not None and lanes.size == 0:
            return
        x = addr(lanes)
        do_store(S, space, x, lanes, es, vec, vals(lanes), ins)

    return f


@op(
    "prefetch",
    "prefetchu",
    "applypriority",
    "discard",
    "createpolicy",
    "griddepcontrol",
    "setmaxnreg",
    "nanosleep",
    "pmevent",
)
def nothing(b, ins):
    if ins.op == "createpolicy":
        d = b.dst(ins.ops[0], "u64")
        return b.emit(ins, d, lambda: np.zeros(1, u64))
    if ins.op == "discard":
        unsupported(ins)
    return lambda S: None


@op("membar", "fence")
def fence(b, ins):
    block_only = "cta" in ins.mods

    def f(S):
        if S.grace is not None and not block_only:
            S.grace.fence(S, S.path.m)

    return f


@op("trap", "brkpt")
def trap(b, ins):
    from .errors import TrapError

    active = b.active(ins)

    def f(S):
        lanes = active(S)
        if lanes is None or lanes.size:
            lane = 0 if lanes is None else int(lanes[0])
            raise TrapError(f"{ins.op} at PTX line {ins.line} {ins.src} by block/thread {S.where(lane)}")

    return f


# ---- cp.async -------------------------------------------------------------------------------------
@op("cp")
def cp(b, ins):
    m = ins.mods
    if m[0] != "async":
        unsupported(ins)
    if "bulk" in m:
        from . import ops_sm90

        return ops_sm90.cp_bulk(b, ins)
    if "mbarrier" in m:
        from . import ops_sm90

        return ops_sm90.cp_mbarrier(b, ins)
    if "commit_group" in m:

        def commit(S):
            S.async_gid[S.path.m] += 1

        return commit
    if "wait_group" in m or "wait_all" in m:
        n = None if "wait_all" in m else ins.ops[0].value
        return lambda S: complete(S, S.path.m, n)
    size = ins.ops[2].value
    rest = ins.ops[3:]
    if any(x.endswith("cache_hint") for x in m):
        rest = rest[:-1]
    src_size, ignore = None, None
    if rest:
        o = rest[0]
        if isinstance(o, Reg) and b.types.get(o.name) == "pred":
            ignore = b.psrc(o)
        else:
            src_size = b.src(o, "u32", full=True)
    da, sa, active = address(b, ins.ops[0]), address(b, ins.ops[1]), b.active(ins)

    def f(S):
        lanes = active(S)
        if lanes is not None and lanes.size == 0:
            return
        x = da(lanes)
        flat = flat_shared(S, x, lanes)
        src = sa(lanes) - GLOBAL_BASE
        n = flat.size
        ll = np.arange(S.T) if lanes is None else lanes
        if ignore is not None:
            want = np.where(ignore()[ll], 0, size)
        elif src_size is not None:
            want = src_size[ll].astype(i64)
            if (want > size).any():
                raise LaunchError(f"PTX line {ins.line}: src-size above cp-size in `{ins.text}`")
        else:
            want = None
        es, vec = 4, size // 4
        if want is None or (want == size).all():
            data = S.gmem.load(S, src, lanes, es, vec, ins)
            if S.meter:
                S.stats.global_access(S, src, lanes, size, "load", ins)
        else:
            data = np.zeros((n, vec) if vec > 1 else n, u32)
            k = np.flatnonzero(want == size)
            if k.size:
                data[k] = S.gmem.load(S, src[k], ll[k], es, vec, ins)
                if S.meter:
                    S.stats.global_access(S, src[k], ll[k], size, "load", ins)
            for part in np.unique(want):
                if 0 < part < size:
                    k = np.flatnonzero(want == part)
                    by = data.reshape(n, -1).view(u8)
                    for j in range(int(part)):
                        by[k, j] = S.gmem.load(S, src[k] + j, ll[k], 1, 1, ins)
        if S.meter:
            S.stats.cp_async_bytes += n * size
            S.stats.shared_access(S, flat, lanes, size, "store", ins)
        if S.grace is not None:
            k = slice(None) if want is None else np.flatnonzero(want > 0)
            S.grace.access(S, src[k], ll[k], size, "load", ins, None)
        issue(S, flat, lanes, ll, size, data, ins)

    return f


_FLAG_FLY = ALLOC | INIT | INFLIGHT
_FLAG_DONE = ALLOC | INIT | LOADED | STORED


def _pat(byte, es):
    return UINT[es](int.from_bytes(bytes([byte]) * es, "little"))


def _flag_rows(sp, which, size):
    a = {"flag": sp.flag, "l": sp.slow_l, "s": sp.slow_s}[which]
    r = a.view(UINT[min(size, 8)])
    return r.reshape(-1, size // 8) if size > 8 else r


def issue(S, flat, lanes, ll, size, data, ins):
    """Queue an asynchronous write to shared memory; it becomes visible at the wait."""
    sp = S.smem
    if np.count_nonzero(flat & (size - 1)):
        sp.misaligned(S, flat, lanes, size, ins)
    idx = flat >> {4: 2, 8: 3, 16: 4}[size]
    if np.take(sp.shadow("s", size), idx, 0 if size > 8 else None, mode="clip").any():
        sp.slow_store(S, flat, lanes, size, ins)
    if S.race is not None:
        S.race.access(S, flat, lanes, size, "store", ins, None)
    es = min(size, 8)
    _flag_rows(sp, "flag", size)[idx] = _pat(_FLAG_FLY, es)
    _flag_rows(sp, "l", size)[idx] = _pat(1, es)
    _flag_rows(sp, "s", size)[idx] = _pat(1, es)
    S.async_items.append((ll, S.async_gid[ll], idx, size, data, ins, flat))


def complete(S, m, keep):
    """cp.async.wait_group keep (None: wait_all) by the lanes of mask m."""
    if not S.async_items:
        return
    left = []
    for it in S.async_items:
        ll, gid, idx, size, data, ins, flat = it
        sel = m[ll] if keep is None else m[ll] & (gid < S.async_gid[ll] - keep)
        c = int(np.count_nonzero(sel))
        if c == 0:
            left.append(it)
            continue
        if c == sel.size:
            land(S, ll, idx, size, data, ins, flat)
        else:
            land(S, ll[sel], idx[sel], size, data[sel], ins, flat[sel])
            k = ~sel
            left.append((ll[k], gid[k], idx[k], size, data[k], ins, flat[k]))
    S.async_items = left


def land(S, ll, idx, size, data, ins, flat):
    sp = S.smem
    es = min(size, 8)
    sp.rows(4, size // 4)[idx] = data
    _flag_rows(sp, "flag", size)[idx] = _pat(_FLAG_DONE, es)
    _flag_rows(sp, "l", size)[idx] = 0
    _flag_rows(sp, "s", size)[idx] = 0
    if S.race is not None:
        S.race.access(S, flat, ll, size, "store", ins, None)
