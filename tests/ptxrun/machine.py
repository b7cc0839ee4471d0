"""State of one batch of blocks: lanes, masks, registers, shared and local memory."""

from __future__ import annotations
import numpy as np
from .errors import CheckError, Finding
from .memory import Space, ALLOC, POISON

SHARED_BASE = 1024  # first address of shared variables (so that null is invalid)
LOCAL_BASE = 16


class Path:
    """A set of lanes at the same place. Derived facts are computed once and kept."""

    __slots__ = ("m", "n", "_lanes", "wc", "bc", "_nw")

    def __init__(self, m, n=None):
        self.m = m
        self.n = int(np.count_nonzero(m)) if n is None else n
        self._lanes = False
        self.wc = self.bc = None
        self._nw = -1

    def lanes(self):
        if self._lanes is False:
            self._lanes = None if self.n == self.m.size else self.m.nonzero()[0]
        return self._lanes

    @property
    def nw(self):
        if self._nw < 0:
            self._nw = int(np.count_nonzero(self.m.reshape(-1, 32).any(1)))
        return self._nw


class RegFile:
    """Registers of one frame: name -> array over the lanes; typed views are cached."""

    DT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: None}

    def __init__(self, T):
        self.T, self.r = T, {}

    def get(self, name, typ):
        a = self.r.get(name)
        if a is None:
            from .parser import TYPE_SIZE

            if typ == "pred":
                a = np.zeros(self.T, np.bool_)
            elif typ == "b128":
                a = np.zeros((self.T, 2), np.uint64)
            else:
                a = np.empty(self.T, self.DT[TYPE_SIZE[typ]])
                a.view(np.uint8)[:] = POISON
            self.r[name] = a
        return a

    def poison(self):
        for a in self.r.values():
            if a.dtype == np.bool_:
                a[:] = False
            else:
                a.view(np.uint8)[...] = POISON


class Batch:
    """All state of the blocks that run in lock step."""

    def __init__(self, nblocks, ntid, grid, smem_bytes, local_bytes, launch):
        self.launch = launch
        self.B = nblocks
        self.ntid = ntid
        tpb = ntid[0] * ntid[1] * ntid[2]
        self.tpb = tpb
        self.TP = -(-tpb // 32) * 32
        self.T = T = self.B * self.TP
        self.W = T // 32
        self.grid = grid
        self.block_ids = np.zeros(nblocks, np.int64)
        lane = np.arange(T)
        self.lane_block = lane // self.TP
        self.t_in_block = lane % self.TP
        self.valid = self.t_in_block < tpb
        self.live = self.valid.copy()
        self.nlive = int(self.live.sum())
        self.mask = self.live
        self.full = True
        self.path = Path(self.live.copy())
        self.special = {}
        self.mbars, self.mbar_run = None, -1
        self._specials()
        self.cc = np.zeros(T, np.bool_)
        self.clock = 0
        self.gmem = launch.gspace
        self._shared(smem_bytes)
        self._local(local_bytes)
        self.regs = {}
        self.async_items, self.async_gid = [], np.zeros(T, np.int64)
        self.epoch = np.zeros(nblocks, np.int64)
        self.wepoch = np.zeros(self.W, np.int64)
        self.stats = launch.stats
        self.meter = launch.meter
        self.race = None
        self.grace = None
        self.tpos = (
            self.t_in_block % ntid[0],
            self.t_in_block // ntid[0] % ntid[1],
            self.t_in_block // (ntid[0] * ntid[1]),
        )

    # ---- special registers ----------------------------------------------------------------------
    def _specials(self):
        T, u32 = self.T, np.uint32
        t, (nx, ny, nz) = self.t_in_block, self.ntid
        sp = self.special
        sp["%tid.x"], sp["%tid.y"], sp["%tid.z"] = (
            (t % nx).astype(u32),
            (t // nx % ny).astype(u32),
            (t // (nx * ny)).astype(u32),
        )
        for k, a in enumerate("xyz"):
            sp["%ntid." + a] = np.full(T, self.ntid[k], u32)
            sp["%nctaid." + a] = np.full(T, self.grid[k], u32)
            sp["%ctaid." + a] = np.zeros(T, u32)
            sp["%clusterid." + a] = sp["%ctaid." + a]
            sp["%nclusterid." + a] = sp["%nctaid." + a]
            sp["%cluster_ctaid." + a] = np.zeros(T, u32)
            sp["%cluster_nctaid." + a] = np.ones(T, u32)
        l = (t % 32).astype(u32)
        sp["%laneid"] = l
        sp["%warpid"] = (t // 32).astype(u32)
        sp["%nwarpid"] = np.full(T, self.TP // 32, u32)
        one = np.uint32(1)
        eq = (one << l).astype(u32)
        sp["%lanemask_eq"] = eq
        sp["%lanemask_lt"] = (eq - one).astype(u32)
        sp["%lanemask_le"] = ((eq - one) | eq).astype(u32)
        sp["%lanemask_ge"] = ~sp["%lanemask_lt"]
        sp["%lanemask_gt"] = ~sp["%lanemask_le"]
        sp["%smid"] = np.zeros(T, u32)
        sp["%nsmid"] = np.full(T, self.launch.nsm, u32)
        sp["%gridid"] = np.zeros(T, np.uint64)
        sp["%cluster_ctarank"] = np.zeros(T, u32)
        sp["%cluster_nctarank"] = np.ones(T, u32)
        sp["%is_explicit_cluster"] = np.zeros(T, np.bool_)
        sp["%dynamic_smem_size"] = np.full(T, self.launch.dynamic_smem, u32)
        sp["%total_smem_size"] = np.full(T, self.launch.smem_bytes, u32)
        for k, v in self.launch.envregs.items():
            sp[f"%envreg{k}"] = np.full(T, v, u32)
        for n in ("%clock", "%clock_hi", "%globaltimer_lo", "%globaltimer_hi"):
            sp[n] = np.zeros(T, u32)
        for n in ("%clock64", "%globaltimer"):
            sp[n] = np.zeros(T, np.uint64)

    def tick(self, name):
        self.clock += 1
        a = self.special[name]
        a[:] = self.stats.steps * 16 + self.clock if not name.endswith("hi") else 0

    def _shared(self, nbytes):
        self.sh_bytes = nbytes
        stride = -(-(SHARED_BASE + nbytes + 64) // 1024) * 1024
        self.sh_stride = stride
        self.sh_guard = stride - 32
        n = stride * self.B
        self.smem = sp = Space("shared", ("oob", "uninit_shared"))
        sp.bind(*(np.zeros(n, np.uint8) for _ in range(4)))
        self.sh_base = self.lane_block * stride
        self._reset_shared()

    def _reset_shared(self):
        sp, st, nb = self.smem, self.sh_stride, self.sh_bytes
        sp.data[:] = POISON
        sp.slow_l[:] = 1
        sp.slow_s[:] = 1
        f = sp.flag.reshape(self.B, st)
        f[:] = 0
        f[:, SHARED_BASE : SHARED_BASE + nb] = ALLOC

    def _local(self, nbytes):
        self.lo_bytes = nbytes
        stride = -(-(LOCAL_BASE + nbytes + 32) // 64) * 64 if nbytes else 64
        self.lo_stride, self.lo_guard = stride, stride - 16
        n = stride * self.T
        self.lmem = sp = Space("local", ("oob", "uninit_local"))
        sp.bind(*(np.zeros(n, np.uint8) for _ in range(4)))
        self.lo_base = np.arange(self.T) * stride
        self._reset_local()

    def _reset_local(self):
        sp = self.lmem
        sp.data[:] = POISON
        sp.slow_l[:] = 1
        sp.slow_s[:] = 1
        f = sp.flag.reshape(self.T, self.lo_stride)
        f[:] = 0
        f[:, LOCAL_BASE : LOCAL_BASE + self.lo_bytes] = ALLOC

    def start(self, ids):
        """Prepare for the blocks with linear ids `ids` (as many as self.B, or fewer)."""
        ids = np.asarray(ids, np.int64)
        k = len(ids)
        self.block_ids[:k] = ids
        gx, gy, _ = self.grid
        b = self.block_ids[self.lane_block]
        self.special["%ctaid.x"][:] = b % gx
        self.special["%ctaid.y"][:] = b // gx % gy
        self.special["%ctaid.z"][:] = b // (gx * gy)
        self.special["%smid"][:] = b % self.launch.nsm
        self.live[:] = self.valid & (self.lane_block < k)
        self.nlive = int(self.live.sum())
        self.full = True
        self._reset_shared()
        if self.lo_bytes:
            self._reset_local()
        for rf in self.regs.values():
            rf.poison()
        self.async_items = []
        self.async_gid[:] = 0
        self.epoch[:] = 0
        self.wepoch[:] = 0
        if self.race:
            self.race.reset()

    # ---- masks ------------------------------------------------------------------------------------
    def lanes(self):
        return self.path.lanes()

    def warp_bits(self, m):
        return np.packbits(m.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32)[:, 0]

    # ---- findings -----------------------------------------------------------------------------------
    def where(self, lane):
        b = int(self.block_ids[self.lane_block[lane]])
        gx, gy, _ = self.grid
        return ((b % gx, b // gx % gy, b // (gx * gy)), tuple(int(p[lane]) for p in self.tpos))

    def report(self, kind, bad, flat, lanes, space, ins, message):
        pol = self.launch.checks.get(kind, "raise")
        if pol == "off":
            return
        k = int(np.flatnonzero(bad)[0])
        lane = k if lanes is None else int(lanes[k])
        block, thread = self.where(lane)
        a = int(flat[k])
        if space is self.smem:
            a -= int(self.sh_base[lane])
            if a == self.sh_guard:
                message += " (address beyond the shared window)"
        elif space is self.lmem:
            a -= int(self.lo_base[lane])
        elif space is self.gmem:
            a += self.launch.mem.base
            message += self.launch.describe(a)
        f = Finding(kind, message, ins.line, ins.text, ins.src, block, thread, a, int(np.count_nonzero(bad)))
        if pol == "raise":
            raise CheckError(f)
        self.launch.record(f)
