"""Race detectors for shared and for global memory (options of a launch)."""

from __future__ import annotations
import numpy as np
from .errors import Finding, CheckError

i64 = np.int64
NONE, MANY, WARP = -1, -2, -10


class SharedRace:
    """Per byte: who stored, loaded and did atomics since the last block barrier, and in which warp epoch
    (bar.warp.sync orders lanes of one warp). A holder is a lane, several lanes of one warp (WARP - warp)
    or several warps (MANY). Equal values written by several threads are no finding."""

    def __init__(self, S):
        self.S = S
        n = S.smem.limit
        self.w, self.r, self.a = ((np.full(n, NONE, np.int32), np.zeros(n, np.int32)) for _ in range(3))

    def reset(self):
        for h, _ in (self.w, self.r, self.a):
            h[:] = NONE

    def barrier(self, S, blocks):
        for h, _ in (self.w, self.r, self.a):
            h.reshape(S.B, S.sh_stride)[blocks] = NONE

    def forget(self, flat, size):
        """An asynchronous write has landed and was waited for through an mbarrier."""
        b = (flat[:, None] + np.arange(size)).ravel()
        self.w[0][b] = NONE
        self.r[0][b] = NONE

    def acquire(self, S, lanes):
        """A wait on an mbarrier succeeded: taken as ordering everything before it in the block (lenient)."""
        for blk in np.unique(S.lane_block[lanes]):
            for h, _ in (self.w, self.r, self.a):
                h.reshape(S.B, S.sh_stride)[blk] = NONE

    @staticmethod
    def _conflict(h, b, me, ep):
        """True where the earlier holder is not me and nothing orders it before me."""
        who, when = h[0][b], h[1][b]
        warp = np.where(who >= 0, who >> 5, np.where(who <= WARP, WARP - who, -1))
        return (who != NONE) & (who != me) & ~((warp == me >> 5) & (when < ep))

    @staticmethod
    def _mark(h, b, me, ep):
        """Add me to the holders (loads and atomics)."""
        who, when = h[0][b], h[1][b]
        mw = me >> 5
        warp = np.where(who >= 0, who >> 5, np.where(who <= WARP, WARP - who, -1))
        new = np.where(
            (who == NONE) | (who == me) | ((warp == mw) & (when < ep)), me, np.where(warp == mw, WARP - mw, MANY)
        ).astype(np.int32)
        h[0][b] = new
        h[1][b] = ep
        got = h[0][b]
        dup = (got != me) & (got >= 0)
        if dup.any():  # several lanes of this instruction
            h[0][b[dup]] = WARP - mw[dup]
            cross = dup & (got >> 5 != mw)
            h[0][b[cross]] = MANY

    def access(self, S, flat, lanes, size, kind, ins, vals):
        me = (np.arange(S.T) if lanes is None else lanes).astype(np.int32)
        ep = S.wepoch[me >> 5].astype(np.int32)
        data = S.smem.data
        v8 = None
        if kind == "store" and vals is not None:
            v8 = np.ascontiguousarray(vals).view(np.uint8).reshape(flat.size, size)
        flat = np.clip(flat, 0, S.smem.limit - size)

        def check(h, what, mask=None):
            bad = self._conflict(h, b, me, ep)
            if mask is not None:
                bad &= mask
            if bad.any():
                self.found(S, bad, flat, lanes, ins, what, b, h)

        for j in range(size):
            b = flat + j
            if kind == "load":
                check(self.w, "read after write by thread")
                check(self.a, "read after atomic by thread")
                self._mark(self.r, b, me, ep)
            elif kind == "store":
                change = None if v8 is None else data[b] != v8[:, j]
                check(self.w, "write after write by thread", change)
                check(self.r, "write after read by thread", change)
                check(self.a, "write after atomic by thread", change)
                self.w[0][b] = me
                self.w[1][b] = ep
                win = self.w[0][b]
                clash = win != me
                if clash.any() and v8 is not None:
                    pos = np.full(S.T, -1)
                    pos[me] = np.arange(me.size)
                    differs = clash & (v8[pos[win], j] != v8[:, j])
                    if differs.any():
                        self.found(
                            S, differs, flat, lanes, ins, "different values in one instruction; other thread", b, self.w
                        )
            else:
                check(self.w, "atomic after write by thread")
                check(self.r, "atomic after read by thread")
                self._mark(self.a, b, me, ep)

    def found(self, S, bad, flat, lanes, ins, what, b, h):
        k = int(np.flatnonzero(bad)[0])
        o = int(h[0][b[k]])
        other = str(S.where(o)[1]) if o >= 0 else "several"
        S.report("race_shared", bad, flat, lanes, S.smem, ins, f"{what} {other} with no barrier between")


class GlobalRace:
    """Happens-before by vector clocks over blocks: barriers order threads inside a block, atomics and
    acquire/release/volatile accesses order blocks.  Normally every such access counts as acquire +
    release, so a missing fence is not found; with race_global='strict', relaxed ones (atomicAdd, volatile)
    publish only what a membar/fence of gpu scope precedes and acquire only at the next such fence.  Reports plain accesses of different threads to one place, at least one
    of them a store that changes the value, that nothing orders; and plain stores unordered with atomics.
    The granule is the smallest access of the kernel (1, 2 or 4 bytes)."""

    def __init__(self, launch, bbs):
        from .parser import TYPE_SIZE

        self.L = launch
        sizes = [
            TYPE_SIZE[m]
            for bb in bbs
            for e in bb.ins
            if e[0].op in ("ld", "st")
            and not {"param", "local"} & set(e[0].mods)
            and not any(x.startswith("shared") for x in e[0].mods)
            for m in e[0].mods[-1:]
            if m in TYPE_SIZE
        ]
        self.g = min([4] + sizes)
        n = launch.gspace.limit // self.g
        self.nb = int(np.prod(launch.grid))
        self.vc = np.zeros((self.nb, self.nb), np.int32) if self.nb <= 4096 else None
        if self.vc is not None:
            np.fill_diagonal(self.vc, 1)
        self.clk = np.ones(self.nb, np.int32)
        # last store, load, atomic: block + 1 (0: none), clock, thread in block, barrier epoch, warp epoch
        self.w, self.r, self.a = ([np.zeros(n, np.int32) for _ in range(5)] for _ in range(3))
        self.locs = {}
        self.strict = launch.race_global == "strict" and self.vc is not None
        if self.strict:
            self.fenced, self.pending = np.zeros_like(self.vc), np.zeros_like(self.vc)

    def barrier(self, S, blocks):
        pass  # the batch's per-block epoch counts barriers

    def fence(self, S, m):
        if not self.strict:
            return
        for b in S.block_ids[m.reshape(S.B, S.TP).any(1)]:
            np.maximum(self.vc[b], self.pending[b], out=self.vc[b])
            self.fenced[b] = self.vc[b]
            self.clk[b] += 1
            self.vc[b, b] = self.clk[b]

    def _unordered(self, h, u, blk, thr, ep, we):
        """True where the earlier access kept in h is not ordered before (blk, thr, ep)."""
        ob = h[0][u] - 1
        has = ob >= 0
        if not has.any():
            return has
        if self.vc is not None:
            seen = self.vc[blk, np.maximum(ob, 0)] >= h[1][u]
        else:
            seen = np.zeros(ob.size, bool)
        ot = h[2][u]
        inner = (ot != thr) & (h[3][u] == ep) & ~((ot >> 5 == thr >> 5) & (h[4][u] < we))
        return has & np.where(ob == blk, inner, ~seen)

    @staticmethod
    def _set(h, u, blk, ck, thr, ep, we):
        h[0][u], h[1][u], h[2][u], h[3][u], h[4][u] = blk + 1, ck, thr, ep, we

    def access(self, S, flat, lanes, size, kind, ins, vals):
        ln = np.arange(S.T) if lanes is None else lanes
        blk = S.block_ids[S.lane_block[ln]].astype(i64)
        thr = S.t_in_block[ln].astype(np.int32)
        ep = S.epoch[S.lane_block[ln]].astype(np.int32)
        we = S.wepoch[ln >> 5].astype(np.int32)
        ck = self.clk[blk]
        g = self.g
        data = S.gmem.data
        v8 = None if vals is None else np.ascontiguousarray(vals).view(np.uint8).reshape(flat.size, size)

        def check(h, mask, what):
            bad = self._unordered(h, u, blk, thr, ep, we)
            if mask is not None:
                bad &= mask
            if bad.any():
                self.found(S, bad, flat, lanes, ins, what, u, h)

        for j in range(max(size // g, 1)):
            u = (flat + g * j) // g
            if kind == "load":
                check(self.w, None, "load unordered with a store by")
                self._set(self.r, u, blk, ck, thr, ep, we)
            elif kind == "atomic":
                check(self.w, None, "atomic unordered with a plain store by")
                self._set(self.a, u, blk, ck, thr, ep, we)
            else:
                new = v8[:, g * j : g * j + g]
                change = (data[(flat + g * j)[:, None] + np.arange(g)] != new).any(1)
                check(self.w, change, "store of a different value, unordered with a store by")
                check(self.r, change, "store that changes a value, unordered with a load by")
                check(self.a, change, "plain store unordered with an atomic by")
                self._set(self.w, u, blk, ck, thr, ep, we)
                gid = (blk + 1) * 1024 + thr
                win = self.w[0][u] * i64(1024) + self.w[2][u]
                clash = win != gid  # several lanes of this instruction, one place
                if clash.any():
                    pos = {int(x): k for k, x in enumerate(gid)}
                    wk = np.array([pos[int(x)] for x in win[clash]])
                    me = np.flatnonzero(clash)
                    d = (new[wk] != new[me]).any(1)
                    if d.any():
                        bad = np.zeros(flat.size, bool)
                        bad[me[d]] = True
                        self.found(
                            S, bad, flat, lanes, ins, "different values stored in one instruction; other", u, self.w
                        )

    def sync(self, S, x, lanes, how, mods=()):
        """A synchronising access (atomic, acquire / release / volatile): joins the clocks of the
        lanes' blocks and of the locations, in the order of execution. After a release the block's
        clock rises, so later plain accesses are not covered by it."""
        if self.vc is None:
            return
        ln = np.arange(S.T) if lanes is None else lanes
        blk = S.block_ids[S.lane_block[ln]]
        sc = "acq_rel" in mods or "sc" in mods
        weak_acq = self.strict and not (sc or "acquire" in mods)
        weak_rel = self.strict and not (sc or "release" in mods)
        for a, b in dict.fromkeys(zip(x.tolist(), blk.tolist())):
            L = self.locs.get(a)
            if L is None:
                L = self.locs[a] = np.zeros(self.nb, np.int32)
            if how != "release":
                t = self.pending[b] if weak_acq else self.vc[b]
                np.maximum(t, L, out=t)
            if how != "acquire" and weak_rel:
                np.maximum(L, self.fenced[b], out=L)
            elif how != "acquire":
                np.maximum(L, self.vc[b], out=L)
                self.clk[b] += 1
                self.vc[b, b] = self.clk[b]

    def found(self, S, bad, flat, lanes, ins, what, u, h):
        k = int(np.flatnonzero(bad)[0])
        b = int(h[0][u[k]]) - 1
        gx, gy, _ = S.grid
        other = f"block {(b % gx, b // gx % gy, b // (gx * gy))} thread {int(h[2][u[k]])}"
        S.report("race_global", bad, flat, lanes, S.gmem, ins, f"{what} {other}")
