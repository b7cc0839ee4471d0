"""Counters of one launch."""

from __future__ import annotations
from collections import Counter, OrderedDict
import numpy as np


def _distinct_per_row(keys):
    """Number of distinct values in all rows of a 2-D array together (row by row)."""
    d = keys[:, 1:] - keys[:, :-1]
    if (d < 0).any():
        keys = np.sort(keys, axis=1)
        d = keys[:, 1:] - keys[:, :-1]
    return keys.shape[0] + int(np.count_nonzero(d))


class Cache:
    """A second-level cache of `size` bytes: lines of 128, the least recently used of which makes room for another, with
    sectors of 32 that memory fills one by one. Stored sectors are in it without being read."""

    def __init__(self, size):
        self.capacity = size // 128
        self.lines = OrderedDict()  # line -> bits of the sectors that are there
        self.missed_bytes = 0  # of loads and atomics

    def access(self, flat, size, kind):
        """One instruction's bytes: what several threads ask for at once is asked for once."""
        sectors = np.unique(np.concatenate([flat >> 5, (flat + size - 1) >> 5]))
        starts = np.flatnonzero(np.r_[True, np.diff(sectors >> 2) > 0])
        bits = np.bitwise_or.reduceat(1 << (sectors & 3), starts)
        for line, wanted in zip((sectors[starts] >> 2).tolist(), bits.tolist()):
            there = self.lines.pop(line, 0)
            self.lines[line] = there | wanted
            if kind != "store":
                self.missed_bytes += 32 * (wanted & ~there).bit_count()
            if len(self.lines) > self.capacity:
                self.lines.popitem(last=False)


class Stats:
    """Everything counted in a launch. `opcodes` counts thread-level executions per opcode,
    `warp_opcodes` warp-level ones (a warp counts when at least one of its lanes is active)."""

    def __init__(self):
        self.opcodes, self.warp_opcodes = Counter(), Counter()
        self.steps = 0  # numpy-level instructions executed
        self.batches = 0
        self.global_load_bytes = self.global_store_bytes = 0
        self.global_load_sectors = self.global_store_sectors = 0
        self.global_load_requests = self.global_store_requests = 0
        self.atomics = self.atomic_sectors = self.atomic_requests = self.atomic_bytes = 0
        self.shared_atomics = 0
        self.shared_load_bytes = self.shared_store_bytes = 0
        self.shared_requests = self.shared_wavefronts = self.shared_ideal_wavefronts = 0
        self.local_bytes = 0
        self.barriers = 0  # per block
        self.warp_syncs = 0
        self.cp_async_bytes = 0
        self.mma = 0  # warp-level mma instructions
        self.mma_flops = 0
        self.unique_load_bytes = self.unique_store_bytes = self.unique_bytes = 0
        self.threads = self.blocks = 0
        self.seconds = 0.0
        self.exited_lanes_named = 0
        self.mem_detail = {}  # PTX line -> [kind, requests, sectors, bytes]
        self.l2 = None  # a Cache, where one was asked for

    # ---- recording --------------------------------------------------------------------------------
    def _sectors(self, S, flat, lanes, size):
        sec = flat >> 5
        span = 2 if size > 32 else 1
        if lanes is None:
            w = S.W
            n = _distinct_per_row(sec.reshape(w, 32))
        else:
            wid = lanes >> 5
            w = 1 + int(np.count_nonzero(wid[1:] != wid[:-1])) if lanes.size else 0
            key = (wid << 44) + sec
            d = key[1:] - key[:-1]
            if (d < 0).any():
                key = np.sort(key)
                d = key[1:] - key[:-1]
            n = 1 + int(np.count_nonzero(d)) if lanes.size else 0
        return w, n * span

    def global_access(self, S, flat, lanes, size, kind, ins):
        w, n = self._sectors(S, flat, lanes, size)
        nb = flat.size * size
        if self.l2 is not None and flat.size:
            self.l2.access(flat, size, kind)
        if kind == "load":
            self.global_load_bytes += nb
            self.global_load_sectors += n
            self.global_load_requests += w
        elif kind == "store":
            self.global_store_bytes += nb
            self.global_store_sectors += n
            self.global_store_requests += w
        else:
            self.atomics += flat.size
            self.atomic_bytes += nb
            self.atomic_sectors += n
            self.atomic_requests += w
        e = self.mem_detail.get(ins.line)
        if e is None:
            e = self.mem_detail[ins.line] = [f"global {kind} {size}B", 0, 0, 0]
        e[1] += w
        e[2] += n
        e[3] += nb

    def shared_access(self, S, flat, lanes, size, kind, ins):
        nb = flat.size * size
        if kind == "load":
            self.shared_load_bytes += nb
        elif kind == "store":
            self.shared_store_bytes += nb
        else:
            self.shared_atomics += flat.size
        # a request of 8 (16) bytes per lane is served by half (quarter) warps; the unit of `size`
        # bytes decides the banks, so conflicts are counted in units
        unit = max(size, 4)
        per = 128 // unit  # lanes served together
        lg = {4: 2, 8: 3, 16: 4, 32: 5}[unit]
        u = flat >> lg
        if lanes is None:
            req = S.W
            u = u.reshape(-1, per)
            d = u[:, 1:] - u[:, :-1]
            if ((d >= 0) & (u[:, -1:] - u[:, :1] < per)).all():  # no two words in one bank
                self._sh(ins, kind, req, u.shape[0], u.shape[0], size)
                return
            u = np.sort(u, axis=1)
            new = np.empty(u.shape, bool)
            new[:, 0] = True
            np.not_equal(u[:, 1:], u[:, :-1], out=new[:, 1:])
            g = np.broadcast_to(np.arange(u.shape[0])[:, None], u.shape)[new]
            u = u[new]
            ng = d.shape[0]
            busy = ng
        else:
            if lanes.size == 0:
                return
            wid = lanes >> 5
            req = 1 + int(np.count_nonzero(wid[1:] != wid[:-1]))
            g = lanes // per
            key = np.sort((g << 40) + u)
            new = np.r_[True, key[1:] != key[:-1]]
            key = key[new]
            g, u = key >> 40, key & ((1 << 40) - 1)
            gnew = np.r_[True, g[1:] != g[:-1]]
            g = np.cumsum(gnew) - 1
            ng = busy = int(g[-1]) + 1
        c = np.bincount(g * per + (u & (per - 1)), minlength=ng * per)
        waves = int(c.reshape(ng, per).max(1).sum())
        self._sh(ins, kind, req, waves, busy, size)

    def _sh(self, ins, kind, req, waves, ideal, size):
        self.shared_requests += req
        self.shared_wavefronts += waves
        self.shared_ideal_wavefronts += ideal
        e = self.mem_detail.get(ins.line)
        if e is None:
            e = self.mem_detail[ins.line] = [f"shared {kind} {size}B", 0, 0, 0]
        e[1] += req
        e[2] += waves
        e[3] += ideal

    # ---- derived -----------------------------------------------------------------------------------
    @property
    def instructions(self):
        return sum(self.opcodes.values())

    @property
    def bytes_moved(self):
        """Bytes that the kernel asked of global memory: loads, stores and atomics (each once)."""
        return self.global_load_bytes + self.global_store_bytes + self.atomic_bytes

    @property
    def sector_bytes(self):
        return 32 * (self.global_load_sectors + self.global_store_sectors + self.atomic_sectors)

    @property
    def load_efficiency(self):
        """Requested bytes / bytes of the 32-byte sectors fetched per warp request (may exceed 1
        when lanes share bytes)."""
        return self.global_load_bytes / max(32 * self.global_load_sectors, 1)

    @property
    def store_efficiency(self):
        return self.global_store_bytes / max(32 * self.global_store_sectors, 1)

    @property
    def bank_conflicts(self):
        return self.shared_wavefronts - self.shared_ideal_wavefronts

    def traffic_ratio(self, least_bytes=None):
        """bytes moved / least possible bytes (default: each touched byte once per direction)."""
        least = least_bytes if least_bytes is not None else self.unique_load_bytes + self.unique_store_bytes
        return self.bytes_moved / max(least, 1)

    def summary(self):
        lines = [
            f"threads {self.threads}  blocks {self.blocks}  thread-instructions {self.instructions}"
            f"  vector steps {self.steps}  {self.seconds:.3f} s",
            f"global loads  {self.global_load_bytes} B in {self.global_load_sectors} sectors"
            f" / {self.global_load_requests} requests (efficiency {self.load_efficiency:.2f})",
            f"global stores {self.global_store_bytes} B in {self.global_store_sectors} sectors"
            f" / {self.global_store_requests} requests (efficiency {self.store_efficiency:.2f})",
            f"unique bytes  loaded {self.unique_load_bytes}, stored {self.unique_store_bytes};"
            f" moved / unique = {self.traffic_ratio():.2f}",
            f"atomics {self.atomics} (shared {self.shared_atomics})  barriers {self.barriers}  mma {self.mma}",
            f"shared {self.shared_load_bytes} B loaded, {self.shared_store_bytes} B stored;"
            f" {self.bank_conflicts} extra wavefronts over {self.shared_ideal_wavefronts}",
            "opcodes: " + ", ".join(f"{k} {v}" for k, v in self.warp_opcodes.most_common(12)) + " (warps)",
        ]
        return "\n".join(lines)
