"""sm_90: wgmma, mbarrier, bulk copies and tensor maps (no clusters, multicast or bulk reductions)."""

from __future__ import annotations
import numpy as np
from .binder import op, unsupported
from .errors import PtxError
from .memory import GLOBAL_BASE, SHARED_WINDOW, LOCAL_WINDOW
from .numeric import direct32
from .ops_mem import address, flat_shared, _flag_rows, _pat, _FLAG_DONE, _FLAG_FLY
from .ops_mma import BITS, decode, G, TG
from .parser import Imm, Reg, Vec, Pair, Sym

u8, u16, u32, u64, i64 = np.uint8, np.uint16, np.uint32, np.uint64, np.int64
f16, f32, f64 = np.float16, np.float32, np.float64


# ---- wgmma ----------------------------------------------------------------------------------------
def fragment_offsets(rows, es, K, major_k, swizzle, lbo, sbo):
    """Byte offsets (before swizzling) of the 16-byte pieces of an operand tile rows x K.

    Returns (offsets (pieces,), order) where taking the loaded pieces as elements and applying
    `order` gives the tile row-major (row, k)."""
    T = 16 // es  # elements per 16 bytes
    width = {0: 1, 3: 2, 2: 4, 1: 8}[swizzle]  # 16-byte units per swizzled row
    if major_k:
        r, c = np.arange(rows)[:, None], np.arange(K // T)[None, :]
        if swizzle == 0:
            off = (r // 8) * sbo + (r % 8) * 16 + c * lbo
        else:
            off = (r // 8) * sbo + (r % 8) * (16 * width) + (c % width) * 16 + (c // width) * lbo
        return off.reshape(-1), None
    k, c = np.arange(K)[:, None], np.arange(rows // T)[None, :]
    if swizzle == 0:
        off = (c % 1) * 16 + c * sbo + (k % 8) * 16 + (k // 8) * lbo
    else:
        off = (c % width) * 16 + (c // width) * lbo + (k % 8) * (16 * width) + (k // 8) * sbo
    return off.reshape(-1), True


_off_cache = {}


def load_tile(S, desc, groups, rows, es, K, major_k, ins):
    """Operand tiles (G, rows, K) as raw words read through shared-memory descriptors."""
    out = np.empty((groups.size, rows, K), u16 if es == 2 else u32 if es == 4 else u8)
    start = ((desc & u64(0x3FFF)) << u64(4)).astype(i64)
    lbo = ((desc >> u64(16)) & u64(0x3FFF)).astype(i64) << 4
    sbo = ((desc >> u64(32)) & u64(0x3FFF)).astype(i64) << 4
    swz = (desc >> u64(62)).astype(i64)
    key = np.stack([lbo, sbo, swz])
    for combo in np.unique(key, axis=1).T:
        sel = np.flatnonzero((key == combo[:, None]).all(0))
        lb, sb, sw = (int(v) for v in combo)
        ck = (rows, es, K, major_k, sw, lb, sb)
        e = _off_cache.get(ck)
        if e is None:
            e = _off_cache[ck] = fragment_offsets(rows, es, K, major_k, sw, lb, sb)
        off, tr = e
        a = start[sel][:, None] + off[None, :]
        mask = {0: 0, 1: 7, 2: 3, 3: 1}[sw]
        if mask:
            a = a ^ (((a >> 7) & mask) << 4)
        lanes = np.repeat(groups[sel] * 128, off.size)
        flat = flat_shared(S, a.reshape(-1), lanes)
        v = S.smem.load(S, flat, lanes, 4, 4, ins)
        if S.race is not None:
            S.race.access(S, flat, lanes, 16, "load", ins, None)
        v = np.ascontiguousarray(v).view(out.dtype)
        out[sel] = v.reshape(sel.size, K, rows).transpose(0, 2, 1) if tr else v.reshape(sel.size, rows, K)
    return out


@op("wgmma")
def wgmma(b, ins):
    m = ins.mods
    if m[0] in ("fence", "commit_group", "wait_group"):
        return lambda S: None
    if "sp" in m or ins.pred is not None:
        unsupported(ins)
    shape = next(x for x in m if x.startswith("m64n"))
    N, K = (int(v) for v in shape[4:].split("k"))
    types = m[m.index(shape) + 1 :]
    dt, at, bt = types[:3]
    if dt not in ("f32", "f16", "s32") or at not in BITS:
        unsupported(ins)
    es = BITS[at] // 8
    D = [b.dst(o, "b32") for o in ins.ops[0].items]
    Din = [b.src(o, "b32", True) for o in ins.ops[0].items]
    a_op, b_op = ins.ops[1], ins.ops[2]
    rest = list(ins.ops[3:])
    scale_d = b.psrc(rest.pop(0)) if rest else None
    imm = [o.value for o in rest]
    regs_a = isinstance(a_op, Vec)
    sa, sb = (imm[0], imm[1]) if len(imm) >= 2 else (1, 1)
    tr = imm[2:]
    ta, tb = (0, tr[0] if tr else 0) if regs_a else (tr + [0, 0])[:2]
    A = [b.src(o, "b32", True) for o in a_op.items] if regs_a else None
    adesc = None if regs_a else b.src(a_op, "u64", True)
    bdesc = b.src(b_op, "u64", True)
    kp = 4 // es
    nreg = 4
    if b.S.TP % 128:
        unsupported(ins, "the block is not a multiple of 128 threads")
    r = np.arange(nreg)[None, :, None]
    j = np.arange(kp)[None, None, :]
    arow = G[:, None, None] + 8 * (r & 1)
    acol = TG[:, None, None] * kp + j + (r >> 1) * (4 * kp)
    ia = (arow * K + acol).reshape(-1) if regs_a else None
    half = dt == "f16"
    nd = len(D)

    def conv(t, raw):
        if t == "tf32":
            return (raw & u32(0xFFFFE000)).view(f32).astype(f64)
        if t == "f16":
            return raw.view(f16).astype(f64)
        if t == "bf16":
            from .numeric import bf_to_f32

            return bf_to_f32(raw).astype(f64)
        if t in ("e4m3", "e5m2"):
            from .ops_cvt import _FP8

            return _FP8[t][raw]
        return raw.view(np.int8 if t == "s8" else u8).astype(f64)

    def f(S):
        g = np.flatnonzero(S.path.m.reshape(-1, 128).all(1))
        x = conv(bt, load_tile(S, bdesc.reshape(-1, 128)[g, 0], g, N, es, K, not tb, ins))
        if regs_a:
            w = np.stack([v.reshape(-1, 4, 32)[g] for v in A], 3)  # (G, 4, 32, 4)
            w = np.ascontiguousarray(w).reshape(g.size * 4, -1)
            tile = np.empty((g.size * 4, 16 * K))
            tile[:, ia] = decode(w, at)
            a = tile.reshape(g.size, 64, K)
        else:
            a = conv(at, load_tile(S, adesc.reshape(-1, 128)[g, 0], g, 64, es, K, not ta, ins))
        y = np.matmul(a, x.transpose(0, 2, 1)) * (sa * sb)  # (G, 64, N)
        # row = 16 w + lane/4 + 8 h, column = 8 n + 2 (lane%4) + c  ->  register 4 n + 2 h + c
        y = y.reshape(g.size, 4, 2, 8, N // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6)
        y = y.reshape(g.size, 128, N // 2)
        if half:
            c = np.stack([v.reshape(-1, 128)[g] for v in Din], 2)
            c = np.ascontiguousarray(c).view(f16).astype(f64)
        else:
            c = np.stack([v.reshape(-1, 128)[g] for v in Din], 2).view(np.int32 if dt == "s32" else f32).astype(f64)
        if scale_d is not None:
            keep = scale_d().reshape(-1, 128)[g]
            c = np.where(keep[:, :, None], c, 0.0)
        y = y + c
        if half:
            v = np.ascontiguousarray(y.astype(f16)).view(u32)
        elif dt == "s32":
            v = y.astype(i64).astype(u32)
        elif S.launch.mma_round == "rz":
            v = direct32(y, np.zeros_like(y), "rz").view(u32)
        else:
            v = y.astype(f32).view(u32)
        for k in range(nd):
            D[k].reshape(-1, 128)[g] = v[:, :, k]
        S.stats.mma += 4 * g.size
        S.stats.mma_flops += 2 * 64 * N * K * g.size

    return f


# ---- mbarrier ---------------------------------------------------------------------------------------
class MBar:
    __slots__ = ("count", "pending", "tx", "phase", "jobs")

    def __init__(self, count):
        self.count = self.pending = count
        self.tx = self.phase = 0
        self.jobs = []

    def check(self):
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.pending = self.count


def _table(S):
    t = getattr(S, "mbars", None)
    if t is None or S.mbar_run != S.stats.batches:
        S.mbars, S.mbar_run = {}, S.stats.batches
        t = S.mbars
    return t


def _mbar(S, flat, ins):
    b = _table(S).get(int(flat))
    if b is None:
        raise PtxError(f"PTX line {ins.line}: mbarrier that was never initialised: `{ins.text}`")
    return b


def _saddr(S, x, lanes):
    x = np.where((x >= SHARED_WINDOW) & (x < LOCAL_WINDOW), x - SHARED_WINDOW, x)
    return flat_shared(S, x, lanes)


def _finish(S, bar):
    """Complete the copies that were issued on a barrier (seen at the next wait on it)."""
    jobs, bar.jobs = bar.jobs, []
    for land, nbytes in jobs:
        land()
        bar.tx -= nbytes
        bar.check()


@op("mbarrier")
def mbarrier(b, ins):
    what = ins.mods[0]
    active = b.active(ins)
    ops = list(ins.ops)
    if what == "init":
        addr, cnt = address(b, ops[0]), b.src(ops[1], "u32", True)

        def init(S):
            lanes = active(S)
            ll = np.arange(S.T) if lanes is None else lanes
            if not ll.size:
                return
            flat = _saddr(S, addr(lanes), lanes)
            S.smem.store(S, flat, lanes, 8, 1, np.zeros(flat.size, u64), ins)
            for fl, l in zip(flat, ll):
                _table(S)[int(fl)] = MBar(int(cnt[l]))

        return init
    if what == "inval":
        addr = address(b, ops[0])

        def inval(S):
            lanes = active(S)
            for fl in _saddr(S, addr(lanes), lanes):
                _table(S).pop(int(fl), None)

        return inval
    if what in ("arrive", "arrive_drop", "expect_tx", "complete_tx"):
        dst = (
            ops.pop(0)
            if what.startswith("arrive")
            and not isinstance(ops[0], type(ins.ops[-1]))
            or (what.startswith("arrive") and isinstance(ops[0], (Reg, Sym)))
            else None
        )
        addr = address(b, ops.pop(0))
        tx = "expect_tx" in ins.mods or what == "complete_tx"
        val = b.src(ops[0], "u32", True) if ops else None
        d = None if dst is None or getattr(dst, "name", "_") == "_" else b.dst(dst, "u64")

        def arrive(S):
            lanes = active(S)
            ll = np.arange(S.T) if lanes is None else lanes
            if not ll.size:
                return
            flat = _saddr(S, addr(lanes), lanes)
            st = np.zeros(ll.size, u64)
            for k, (fl, l) in enumerate(zip(flat, ll)):
                bar = _mbar(S, fl, ins)
                st[k] = bar.phase
                n = 1
                if tx:
                    bar.tx += int(val[l]) * (-1 if what == "complete_tx" else 1)
                elif val is not None:
                    n = int(val[l])
                if what.startswith("arrive"):
                    if what == "arrive_drop":
                        bar.count -= n
                    bar.pending -= n
                    if bar.pending < 0:
                        raise PtxError(
                            f"PTX line {ins.line}: more arrivals than the mbarrier's count: `{ins.text}`"
                            f" block/thread {S.where(int(l))}"
                        )
                bar.check()
            if d is not None:
                if lanes is None:
                    d[:] = st
                else:
                    d[lanes] = st

        return arrive
    if what in ("test_wait", "try_wait"):
        parity = "parity" in ins.mods
        dst = ops[0].a if isinstance(ops[0], Pair) else ops[0]
        pd, addr = b.raw(dst), address(b, ops[1])
        state = b.src(ops[2], "u32" if parity else "u64", True)

        def wait(S):
            lanes = active(S)
            ll = np.arange(S.T) if lanes is None else lanes
            if not ll.size:
                return
            flat = _saddr(S, addr(lanes), lanes)
            uf, inv = np.unique(flat, return_inverse=True)
            bars = [_mbar(S, fl, ins) for fl in uf]
            for bar in bars:
                if bar.jobs:
                    _finish(S, bar)
            ph = np.array([x.phase for x in bars], np.uint64)[inv]
            s = state[ll].astype(u64)
            done = (ph & u64(1)) != (s & u64(1)) if parity else ph > s
            pd[ll] = done
            if S.race is not None and done.any():
                S.race.acquire(S, ll[done])

        return wait
    if what == "pending_count":
        unsupported(ins)
    unsupported(ins)


def cp_mbarrier(b, ins):
    """cp.async.mbarrier.arrive: the lane's earlier cp.async land, then it arrives."""
    from .ops_mem import complete

    addr, active = address(b, ins.ops[0]), b.active(ins)
    noinc = "noinc" in ins.mods

    def f(S):
        lanes = active(S)
        ll = np.arange(S.T) if lanes is None else lanes
        m = np.zeros(S.T, bool)
        m[ll] = True
        flat = _saddr(S, addr(lanes), lanes)
        for fl in np.unique(flat):
            bar = _mbar(S, fl, ins)
            who = np.zeros(S.T, bool)
            who[ll[flat == fl]] = True
            n = int(who.sum())

            def land(who=who, bar=bar, n=n):
                complete(S, who, None)
                bar.pending -= n

            if not noinc:
                bar.pending += n
            bar.jobs.append((land, 0))

    return f


# ---- bulk copies ------------------------------------------------------------------------------------
def cp_bulk(b, ins):
    m = ins.mods
    if "prefetch" in m or "commit_group" in m or "wait_group" in m:
        return lambda S: None
    if "tensor" in m:
        return bulk_tensor(b, ins)
    if any("multicast" in x for x in m):
        unsupported(ins, "multicast")
    spaces = [x.split("::")[0] for x in m if x.split("::")[0] in ("global", "shared")]
    da, sa = address(b, ins.ops[0]), address(b, ins.ops[1])
    size, active = b.src(ins.ops[2], "u32", True), b.active(ins)
    if spaces[:2] == ["shared", "global"]:
        ma = address(b, ins.ops[3])

        def g2s(S):
            lanes = active(S)
            ll = np.arange(S.T) if lanes is None else lanes
            if not ll.size:
                return
            dst, src, bars = _saddr(S, da(lanes), lanes), sa(lanes) - GLOBAL_BASE, _saddr(S, ma(lanes), lanes)
            for k, l in enumerate(ll):
                n = int(size[l])
                if n % 16:
                    raise PtxError(f"PTX line {ins.line}: bulk copy of {n} bytes is not a multiple of 16")
                c = np.arange(n // 16) * 16
                lk = np.full(c.size, l)
                data = S.gmem.load(S, src[k] + c, lk, 4, 4, ins)
                if S.meter:
                    S.stats.global_load_bytes += n
                    S.stats.global_load_sectors += -(-n // 32)
                    S.stats.global_load_requests += 1
                flat = dst[k] + c
                if np.count_nonzero(flat & 15):
                    S.smem.misaligned(S, flat, lk, 16, ins)
                if S.smem.shadow("s", 16)[np.clip(flat >> 4, 0, S.smem.limit // 16 - 1)].any():
                    S.smem.slow_store(S, flat, lk, 16, ins)
                if S.race is not None:
                    S.race.access(S, flat, lk, 16, "store", ins, None)
                idx = flat >> 4
                _flag_rows(S.smem, "flag", 16)[idx] = _pat(_FLAG_FLY, 8)
                _flag_rows(S.smem, "l", 16)[idx] = _pat(1, 8)
                _flag_rows(S.smem, "s", 16)[idx] = _pat(1, 8)

                def land(idx=idx, data=data, flat=flat, lk=lk):
                    S.smem.rows(4, 4)[idx] = data
                    _flag_rows(S.smem, "flag", 16)[idx] = _pat(_FLAG_DONE, 8)
                    _flag_rows(S.smem, "l", 16)[idx] = 0
                    _flag_rows(S.smem, "s", 16)[idx] = 0
                    if S.race is not None:
                        S.race.forget(flat, 16)

                _mbar(S, bars[k], ins).jobs.append((land, n))

        return g2s
    if spaces[:2] == ["global", "shared"]:

        def s2g(S):
            lanes = active(S)
            ll = np.arange(S.T) if lanes is None else lanes
            if not ll.size:
                return
            dst, src = da(lanes) - GLOBAL_BASE, _saddr(S, sa(lanes), lanes)
            for k, l in enumerate(ll):
                n = int(size[l])
                c = np.arange(n // 16) * 16
                lk = np.full(c.size, l)
                v = S.smem.load(S, src[k] + c, lk, 4, 4, ins)
                S.gmem.store(S, dst[k] + c, lk, 4, 4, v, ins)
                if S.meter:
                    S.stats.global_store_bytes += n
                    S.stats.global_store_sectors += -(-n // 32)
                    S.stats.global_store_requests += 1

        return s2g
    unsupported(ins)


# ---- tensor maps ------------------------------------------------------------------------------------
# The 128 bytes of a tensor map are opaque in CUDA; here: address u64 @0; rank-1, elemtype, interleave,
# swizzle, fill u8 @8..12; box u32[5] @16; dims u32[5] @36; strides u64[4] @56 (bytes, from dim 1);
# element strides u32[5] @88.
ELEM_SIZE = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 4, 9: 8, 10: 2, 11: 4, 12: 4}
_FIELDS = {
    "global_address": (0, 8),
    "rank": (8, 1),
    "elemtype": (9, 1),
    "interleave_layout": (10, 1),
    "swizzle_mode": (11, 1),
    "fill_mode": (12, 1),
    "box_dim": (16, 4),
    "global_dim": (36, 4),
    "global_stride": (56, 8),
    "element_stride": (88, 4),
}
_ELEM = {
    "uint8": 0,
    "uint16": 1,
    "uint32": 2,
    "int32": 3,
    "uint64": 4,
    "int64": 5,
    "float16": 6,
    "float32": 7,
    "float64": 9,
    "bfloat16": 10,
}


def pack_tensormap(addr, dtype, dims, strides, box, swizzle=0):
    """Bytes of a host-made tensor map for ptxrun (in place of cuTensorMapEncodeTiled). dims and box:
    innermost first; strides: bytes, for dims 1.. ; swizzle: 0 none, 1 32B, 2 64B, 3 128B."""
    m = np.zeros(128, u8)
    m[0:8] = np.array([int(addr)], u64).view(u8)
    m[8], m[9], m[11] = len(dims) - 1, _ELEM[dtype], swizzle
    for k, (d, x) in enumerate(zip(dims, box)):
        m[36 + 4 * k : 40 + 4 * k] = np.array([d], u32).view(u8)
        m[16 + 4 * k : 20 + 4 * k] = np.array([x], u32).view(u8)
        m[88 + 4 * k : 92 + 4 * k] = np.array([1], u32).view(u8)
    for k, s in enumerate(strides):
        m[56 + 8 * k : 64 + 8 * k] = np.array([s], u64).view(u8)
    return m.tobytes()


@op("tensormap")
def tensormap(b, ins):
    active = b.active(ins)
    from .ops_mem import spaces, space_of

    if ins.mods[0] == "replace":
        field = next(m for m in ins.mods if m in _FIELDS)
        base, n = _FIELDS[field]
        k = ins.ops[1].value if len(ins.ops) == 3 else 0
        off = base + k * n
        val = b.src(ins.ops[-1], "u64" if n == 8 else "u32", True)
        addr, space = address(b, ins.ops[0]), space_of(ins)

        def replace(S):
            lanes = active(S)
            if lanes is not None and not lanes.size:
                return
            v = val if lanes is None else val[lanes]
            for sp, flat, ll, sel, _ in spaces(S, space, addr(lanes) + off, lanes):
                x = v if sel is None else v[sel]
                sp.store(S, flat, ll, n, 1, x.astype({1: u8, 4: u32, 8: u64}[n]), ins)

        return replace
    if ins.mods[0] == "cp_fenceproxy":
        da, sa = address(b, ins.ops[0]), address(b, ins.ops[1])

        def copy(S):
            lanes = active(S)
            ll = np.arange(S.T) if lanes is None else lanes
            if not ll.size:
                return
            ll = ll[np.r_[True, ll[1:] >> 5 != ll[:-1] >> 5]]  # one lane of each warp
            c = np.arange(8) * 16
            lk = np.repeat(ll, 8)
            src = (_saddr(S, sa(ll), ll)[:, None] + c).ravel()
            dst = ((da(ll) - GLOBAL_BASE)[:, None] + c).ravel()
            S.gmem.store(S, dst, lk, 4, 4, S.smem.load(S, src, lk, 4, 4, ins), ins)

        return copy
    unsupported(ins)


class TMap:
    def __init__(self, raw):
        self.addr = int(raw[0:8].view(u64)[0]) - GLOBAL_BASE
        self.rank, self.es = int(raw[8]) + 1, ELEM_SIZE[int(raw[9])]
        self.swizzle = int(raw[11])
        self.box = raw[16:36].view(u32)[: self.rank].astype(i64)
        self.dims = raw[36:56].view(u32)[: self.rank].astype(i64)
        st = raw[56:88].view(u64)[: self.rank - 1].astype(i64)
        self.strides = np.r_[self.es, st]
        if raw[10]:
            raise PtxError("interleaved tensor maps are not supported")

    def tile(self, coords, dst):
        """(global byte offsets, inside mask, shared flat-relative addresses) of a box's elements."""
        idx = np.indices(tuple(self.box[::-1])).reshape(self.rank, -1)[::-1]  # innermost first
        c = idx + np.array(coords, i64)[:, None]
        inside = ((c >= 0) & (c < self.dims[:, None])).all(0)
        g = self.addr + (c * self.strides[:, None]).sum(0)
        lin = dst + np.arange(idx.shape[1]) * self.es
        mask = {0: 0, 1: 1, 2: 3, 3: 7}[self.swizzle]
        return g, inside, lin ^ (((lin >> 7) & mask) << 4)


def bulk_tensor(b, ins):
    m = ins.mods
    sp = [x.split("::")[0] for x in m if x.split("::")[0] in ("global", "shared")]
    if any("im2col" in x or "multicast" in x or "cta_group" in x for x in m):
        unsupported(ins)
    load = sp[:2] == ["shared", "global"]
    tm = ins.ops[1] if load else ins.ops[0]
    other = ins.ops[0] if load else ins.ops[1]
    coords = [b.src(o, "s32", True) for o in tm.extra[0].items]
    ta, oa, active = address(b, tm), address(b, other), b.active(ins)
    ma = address(b, ins.ops[2]) if load else None

    def f(S):
        lanes = active(S)
        ll = np.arange(S.T) if lanes is None else lanes
        if not ll.size:
            return
        taddr, oaddr = ta(lanes), oa(lanes)
        bars = _saddr(S, ma(lanes), lanes) if load else None
        for k, l in enumerate(ll):
            lk8 = np.full(8, l)
            if taddr[k] < GLOBAL_BASE:  # a __grid_constant__ parameter
                from .memory import PARAM_WINDOW

                o = int(taddr[k]) - (PARAM_WINDOW if taddr[k] >= PARAM_WINDOW else 0)
                raw = b.layout.param_bytes[o : o + 128].copy()
            else:
                raw = S.gmem.load(S, taddr[k] - GLOBAL_BASE + np.arange(8) * 16, lk8, 4, 4, ins)
            t = TMap(np.ascontiguousarray(raw).view(u8).reshape(-1))
            es = t.es
            d = oaddr[k : k + 1]
            d = int(np.where((d >= SHARED_WINDOW) & (d < LOCAL_WINDOW), d - SHARED_WINDOW, d)[0])
            if d % 128:
                raise PtxError(f"PTX line {ins.line}: shared address {d:#x} of a tensor copy is not aligned to 128")
            g, inside, sh = t.tile([int(c[l]) for c in coords], d)
            lk = np.full(sh.size, l)
            flat = flat_shared(S, sh, lk)
            nb = int(inside.sum()) * es
            if S.meter:
                st = S.stats
                sec = np.unique(g[inside] >> 5).size
                if load:
                    st.global_load_bytes += nb
                    st.global_load_sectors += sec
                    st.global_load_requests += 1
                else:
                    st.global_store_bytes += nb
                    st.global_store_sectors += sec
                    st.global_store_requests += 1
            if load:
                data = np.zeros(sh.size, {1: u8, 2: u16, 4: u32, 8: u64}[es])
                if nb:
                    data[inside] = S.gmem.load(S, g[inside], lk[inside], es, 1, ins)
                if S.smem.shadow("s", es)[np.clip(flat // es, 0, S.smem.limit // es - 1)].any():
                    S.smem.slow_store(S, flat, lk, es, ins)
                if S.race is not None:
                    S.race.access(S, flat, lk, es, "store", ins, None)
                idx = flat // es
                _flag_rows(S.smem, "flag", es)[idx] = _pat(_FLAG_FLY, es)
                _flag_rows(S.smem, "l", es)[idx] = _pat(1, es)
                _flag_rows(S.smem, "s", es)[idx] = _pat(1, es)

                def land(idx=idx, data=data, flat=flat, es=es):
                    S.smem.rows(es, 1)[idx] = data
                    _flag_rows(S.smem, "flag", es)[idx] = _pat(_FLAG_DONE, es)
                    _flag_rows(S.smem, "l", es)[idx] = 0
                    _flag_rows(S.smem, "s", es)[idx] = 0
                    if S.race is not None:
                        S.race.forget(flat, es)

                _mbar(S, bars[k], ins).jobs.append((land, sh.size * es))
            else:
                v = S.smem.load(S, flat, lk, es, 1, ins)
                if S.race is not None:
                    S.race.access(S, flat, lk, es, "load", ins, None)
                if nb:
                    if S.grace is not None:
                        S.grace.access(S, g[inside], lk[inside], es, "store", ins, v[inside])
                    S.gmem.store(S, g[inside], lk[inside], es, 1, v[inside], ins)

    return f
