"""The scheduler: runs a batch of blocks to the end.

Lanes at the same place form a path; the path with the lowest place runs first, which makes paths
meet again (min-PC reconvergence).  Lanes that need others (barrier, warp-level sync) are parked;
a path that goes round a loop waiting on memory is put behind the others, so spinning blocks and
lanes never starve the ones they wait for."""

from __future__ import annotations
import numpy as np
from .errors import DeadlockError, StepLimit, PtxError
from .machine import Path

INF = 1 << 60
IDLE_ROUNDS = 20000  # turns of loops that only load, with nothing else to run: a deadlock


class Bar:
    """Arrivals at one barrier id."""

    __slots__ = ("m", "cont", "extra", "count", "red")

    def __init__(self, S):
        self.m = np.zeros(S.T, bool)
        self.cont = np.zeros(S.T, np.int64)
        self.extra = np.zeros(S.B, np.int64)
        self.count = None
        self.red = None


class Scheduler:
    def __init__(self, S, code, bbs, guards, max_steps, quantum=200):
        self.S, self.code, self.bbs, self.guards = S, code, bbs, guards
        self.max_steps, self.quantum = max_steps, quantum
        self.need = {}  # bb index -> membermask array or None
        self.bar_info = {}
        self.pure = {}  # target of a spinning back edge -> its loop only loads
        self.nthreads = np.zeros(len(bbs), np.int64)
        self.nwarps = np.zeros(len(bbs), np.int64)
        self.steps = 0

    # ---- path bookkeeping ---------------------------------------------------------------------------
    def push(self, pc, m, n=None):
        p = self.paths.get(pc)
        if p is not None:
            self.paths[pc] = Path(p.m | m)
        else:
            q = self.spun.pop(pc, None)
            if q is not None:
                self.paths[pc] = Path(q.m | m)
            else:
                self.paths[pc] = Path(m, n)

    def run(self):
        S = self.S
        self.paths = {0: Path(S.live.copy(), S.nlive)}
        self.spun, self.parked, self.bars = {}, {}, {}
        since = idle = 0
        last = None
        old = np.seterr(all="ignore")
        try:
            while True:
                if not self.paths:
                    if self.spun:
                        now = [(pc, p.n) for pc, p in self.spun.items()]
                        idle = idle + 1 if now == last and all(self.pure[pc] for pc in self.spun) else 0
                        last = now
                        if idle > IDLE_ROUNDS:
                            self.deadlock()
                        self.paths, self.spun = self.spun, {}
                        since = 0
                    elif not self.unblock():
                        if S.nlive == 0:
                            return
                        self.deadlock()
                    continue
                if self.spun:
                    since += 1
                    if since > self.quantum:
                        since = 0
                        sp, self.spun = self.spun, {}
                        for pc, p in sp.items():
                            self.push(pc, p.m, p.n)
                pc = min(self.paths)
                self.run_path(pc, self.paths.pop(pc))
        finally:
            np.seterr(**old)

    def run_path(self, pc, path):
        S, bbs, code, guards = self.S, self.bbs, self.code, self.guards
        paths = self.paths
        nthreads, nwarps = self.nthreads, self.nwarps
        nxt = min(paths) if paths else INF
        budget = 0
        while True:
            bb = bbs[pc]
            kind = bb.kind
            if kind:
                if kind == "bar":
                    if not self.barrier(bb, path):
                        return
                elif kind == "group":
                    path = self.group_ready(bb, path)
                    if path is None:
                        return
                else:
                    if self.need.get(pc) is not None:
                        self.check_members(bb, path.m)
                    if path.n != S.nlive and not path.wc:
                        path = self.warp_ready(bb, path)
                        if path is None:
                            return
            S.path = path
            S.mask = path.m
            S.full = path.n == S.nlive
            fs = code[pc]
            try:
                for f in fs:
                    f(S)
            except PtxError:
                raise
            except Exception as e:
                ins = bb.ins[fs.index(f)][0]
                e.add_note(f"while executing PTX line {ins.line}: {ins.text}")
                raise
            self.steps += len(fs)
            nthreads[pc] += path.n
            nwarps[pc] += path.nw
            if self.steps > self.max_steps:
                raise StepLimit(
                    f"more than {self.max_steps} vector steps; now at PTX line "
                    f"{bb.ins[-1][0].line if bb.ins else '?'} {bb.ins[-1][0].src if bb.ins else ''} "
                    "(blocks that wait for each other must run together: cooperative=True)"
                )
            t = bb.term
            k = t[0]
            if k == "fall":
                pc = bb.next
            elif k == "bra":
                g = guards[pc]
                if g is None:
                    new = t[3]
                else:
                    p = g()
                    tk = p & path.m
                    c = int(np.count_nonzero(tk))
                    if c == path.n:
                        new = t[3]
                    elif c == 0:
                        new = bb.next
                    else:
                        self.diverge(pc, bb, t[3], path, tk, c)
                        return
                if new <= pc and bb.spin:
                    budget += 1
                    if budget >= bb.spin and (paths or self.spun or path.n != S.nlive):
                        self.spin_out(new, path, bb)
                        return
                    if budget > IDLE_ROUNDS and bb.pure:
                        self.spin_out(new, path, bb)
                        self.deadlock()
                pc = new
            elif k == "exit":
                g = guards[pc]
                tk = path.m if g is None else g() & path.m
                c = path.n if g is None else int(np.count_nonzero(tk))
                if c:
                    S.live &= ~tk
                    S.nlive -= c
                    if self.parked or self.bars:
                        self.unblock()
                if c == path.n:
                    return
                if c:
                    path = Path(path.m & ~tk, path.n - c)
                nxt = min(paths) if paths else INF
                pc = bb.next
            elif k == "brx":
                x = guards[pc]()
                idx = x[path.m]
                for v in np.unique(idx):
                    if v >= len(t[3]):
                        raise PtxError(f"PTX line {t[1].line}: branch index {v} beyond the table")
                    self.push(t[3][int(v)], path.m & (x == v))
                return
            if pc >= nxt:
                self.push(pc, path.m, path.n)
                return

    def diverge(self, pc, bb, target, path, tk, c):
        self.push(bb.next, path.m & ~tk, path.n - c)
        if target <= pc and bb.spin:
            self.spin_out(target, Path(tk, c), bb)
        else:
            self.push(target, tk, c)

    def spin_out(self, pc, path, bb):
        self.pure[pc] = bb.pure
        q = self.paths.pop(pc, None) or self.spun.pop(pc, None)
        if q is not None:
            path = Path(path.m | q.m)
        self.spun[pc] = path

    # ---- warp-level sync -----------------------------------------------------------------------------
    def check_members(self, bb, m):
        """A lane that executes a .sync instruction must be in the mask it gives."""
        S = self.S
        lane = np.arange(S.T, dtype=np.uint32) & 31
        outside = m & ((self.need[bb.index] >> lane) & 1 == 0)
        if outside.any():
            block, thread = S.where(int(np.flatnonzero(outside)[0]))
            ins = bb.ins[0][0]
            raise PtxError(
                f"PTX line {ins.line}: `{ins.text}` is executed by lanes outside its member mask "
                f"(first: block {block} thread {thread})"
            )

    def warp_ready(self, bb, path):
        """The part of `path` (with parked lanes) that may execute bb's sync instruction."""
        S = self.S
        pc = bb.index
        held = self.parked.pop(pc, None)
        m = path.m if held is None else path.m | held
        have = S.warp_bits(m)
        live = S.warp_bits(S.live)
        touched = have != 0
        if not ((live & ~have) != 0)[touched].any():
            p = path if held is None else Path(m)
            p.wc = True
            return p
        mm = self.need.get(pc)
        lack = np.repeat(live & ~have, 32)
        if mm is not None:
            lack = lack & mm
        ready = m & (lack == 0)
        wait = m & (lack != 0)
        n = int(np.count_nonzero(ready))
        if wait.any():
            self.parked[pc] = wait
        return Path(ready, n) if n else None

    def group_ready(self, bb, path):
        """As warp_ready, for instructions of a whole warpgroup (wgmma)."""
        S = self.S
        held = self.parked.pop(bb.index, None)
        m = path.m if held is None else path.m | held
        if S.TP % 128:
            return path
        ok = np.repeat(m.reshape(-1, 128).all(1), 128)
        wait = m & ~ok
        if wait.any():
            self.parked[bb.index] = wait
            m = m & ok
        p = Path(m)
        p.wc = True
        return p if p.n else None

    # ---- block barriers ------------------------------------------------------------------------------
    def barrier(self, bb, path):
        S = self.S
        bid, count, arrive, red = self.bar_info[bb.index]
        if callable(bid) or callable(count):
            return self.barrier_dyn(bb, path, bid, count, arrive, red)
        return self.barrier_at(bb, path, bid, count, arrive, red)

    def barrier_dyn(self, bb, path, bid, count, arrive, red):
        """Barrier id or count in registers."""
        S = self.S
        ids = np.full(S.T, bid) if not callable(bid) else bid()
        cnt = None if count is None else (count() if callable(count) else np.full(S.T, count))
        for v in np.unique(ids[path.m]):
            m = path.m & (ids == v)
            c = None if cnt is None else int(cnt[m][0])
            p = Path(m)
            if self.barrier_at(bb, p, int(v), c, arrive, red):
                self.push(bb.next, m)
        return False

    def passed(self, blocks):
        S = self.S
        S.epoch[blocks] += 1
        S.stats.barriers += int(np.count_nonzero(blocks))
        if S.race is not None:
            S.race.barrier(S, blocks)
        if S.grace is not None:
            S.grace.barrier(S, blocks)

    def barrier_at(self, bb, path, bid, count, arrive, red):
        """True: go on with the same path. False: lanes were parked (or released to self.paths)."""
        S = self.S
        B, TP = S.B, S.TP
        if count is not None and count % 32:
            raise PtxError(f"PTX line {bb.ins[0][0].line}: barrier count {count} is not a multiple of 32")
        if count is not None and count == TP and S.tpb == TP:
            count = None
        st = self.bars.get(bid)
        if st is None and count is None and not arrive and red is None:
            if path.n == S.nlive:
                self.passed(S.live.reshape(B, TP).any(1))
                return True
            if path.bc is None:
                a = path.m.reshape(B, TP).sum(1)
                l = S.live.reshape(B, TP).sum(1)
                path.bc = bool(((a == l) | (a == 0)).all())
            if path.bc:
                self.passed(path.m.reshape(B, TP).any(1))
                return True
        if st is None:
            st = self.bars[bid] = Bar(S)
        if arrive:
            st.extra += path.m.reshape(B, TP).sum(1)
            st.count = count
            self.push(bb.next, path.m, path.n)
            self.release(bid, st)
            return False
        st.m |= path.m
        st.cont[path.m] = bb.next
        st.count = count
        if red is not None:
            st.red = red
        self.release(bid, st)
        return False

    def release(self, bid, st):
        S = self.S
        B, TP = S.B, S.TP
        a = st.m.reshape(B, TP).sum(1)
        if st.count is None:
            need = S.live.reshape(B, TP).sum(1)
            ok = (a > 0) & (a + st.extra >= need)
        else:
            tail = S.TP - S.tpb  # lanes that pad the last warp count as present
            pad = np.where(st.m.reshape(B, TP)[:, S.tpb - 1], tail, 0) if tail else 0
            ok = (a + pad + st.extra >= st.count) & (a > 0)
        if not ok.any():
            return False
        go = st.m & np.repeat(ok, TP)
        if st.red is not None:
            st.red(S, go)
        self.passed(ok)
        st.m &= ~go
        st.extra[ok] = 0
        for pc in np.unique(st.cont[go]):
            self.push(int(pc), go & (st.cont == pc))
        if not st.m.any() and not st.extra.any():
            self.bars.pop(bid, None)
        return True

    def unblock(self):
        """After lanes have exited: barriers or warp syncs may be complete now."""
        moved = False
        for bid, st in list(self.bars.items()):
            moved |= self.release(bid, st)
        for pc in list(self.parked):
            m = self.parked.pop(pc)
            m = m & self.S.live
            ready = self.group_ready if self.bbs[pc].kind == "group" else self.warp_ready
            p = ready(self.bbs[pc], Path(m)) if m.any() else None
            if p is not None:
                self.push(pc, p.m, p.n)
                moved = True
        return moved

    def deadlock(self):
        S = self.S
        out = []
        for bid, st in self.bars.items():
            k = int(np.flatnonzero(st.m)[0])
            line = self.bbs[int(st.cont[k]) - 1].ins[0][0]
            blk, thr = S.where(k)
            a = int(st.m.reshape(S.B, S.TP)[S.lane_block[k]].sum())
            out.append(
                f"{a} threads of block {blk} wait at barrier {bid} (PTX line {line.line}, {line.src}), "
                f"first thread {thr}; live threads in the block: "
                f"{int(S.live.reshape(S.B, S.TP)[S.lane_block[k]].sum())}"
            )
        for pc, m in self.parked.items():
            ins = self.bbs[pc].ins[0][0]
            k = int(np.flatnonzero(m)[0])
            blk, thr = S.where(k)
            out.append(
                f"{int(m.sum())} lanes wait at PTX line {ins.line} `{ins.text}` for lanes of their "
                f"warp that never come (block {blk} thread {thr})"
            )
        for pc, p in self.spun.items():
            ins = next((e[0] for b in self.bbs[pc:] for e in b.ins), None)
            blk, thr = S.where(int(np.flatnonzero(p.m)[0]))
            out.append(
                f"{p.n} lanes spin at PTX line {ins.line} ({ins.src}) on memory that nobody will write "
                f"(first: block {blk} thread {thr}); blocks that wait for each other need cooperative=True"
            )
        raise DeadlockError("nothing can run: " + "; ".join(out))
