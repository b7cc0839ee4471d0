"""Simulated memory: flat byte arenas with per-byte shadow state.

Every arena has, beside its bytes, `flag` (what is known about each byte) and two fast-path maps:
`slow_l` / `slow_s` are 0 where a load / store needs no further attention (allocated, initialised,
already counted).  An access gathers that map at its own width; only when some byte is not 0 does
the slow path look at the flags, so checking costs one gather per access."""

from __future__ import annotations
import numpy as np
from .errors import CheckError, Finding, LaunchError

ALLOC, INIT, RO, LOADED, STORED, INFLIGHT = 1, 2, 4, 8, 16, 32
_U = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

# generic address windows
SHARED_WINDOW = 1 << 40
LOCAL_WINDOW = 2 << 40
PARAM_WINDOW = 3 << 40
GLOBAL_BASE = 16 << 40  # a host maps nothing there: a host buffer may lie at its own device address
POISON = 0xFF


class Space:
    """Arrays + shadow of one address space; offsets are flat int64 byte offsets."""

    def __init__(self, name, kinds):
        self.name = name
        self.oob_kind, self.uninit_kind = kinds
        self.data = self.flag = self.slow_l = self.slow_s = np.zeros(0, np.uint8)
        self._rows = {}

    def bind(self, data, flag, slow_l, slow_s):
        self.data, self.flag, self.slow_l, self.slow_s = data, flag, slow_l, slow_s
        self._rows = {}
        self.limit = data.size

    def rows(self, es, vec):
        k = (es, vec)
        r = self._rows.get(k)
        if r is None:
            r = self.data.view(_U[es])
            if vec > 1:
                r = r.reshape(-1, vec)
            self._rows[k] = r
        return r

    def shadow(self, which, size):
        k = (which, size)
        r = self._rows.get(k)
        if r is None:
            a = self.slow_l if which == "l" else self.slow_s
            r = a.view(_U[min(size, 8)])
            if size > 8:
                r = r.reshape(-1, size // 8)
            self._rows[k] = r
        return r

    # ---- checked access ------------------------------------------------------------------------
    def load(self, S, flat, lanes, es, vec, ins):
        size = es * vec
        if size > 1:
            if np.count_nonzero(flat & (size - 1)):
                self.misaligned(S, flat, lanes, size, ins)
            idx = flat >> _LG[size]
        else:
            idx = flat
        axis = 0 if size > 8 else None
        sh = self.shadow("l", size)
        if np.take(sh, idx, axis, mode="clip").any():
            self.slow_load(S, flat, lanes, size, ins)
        return np.take(self.rows(es, vec), idx, 0 if vec > 1 else None, mode="clip")

    def store(self, S, flat, lanes, es, vec, vals, ins):
        size = es * vec
        if size > 1:
            if np.count_nonzero(flat & (size - 1)):
                self.misaligned(S, flat, lanes, size, ins)
            idx = flat >> _LG[size]
        else:
            idx = flat
        sh = self.shadow("s", size)
        if np.take(sh, idx, 0 if size > 8 else None, mode="clip").any():
            keep = self.slow_store(S, flat, lanes, size, ins)
            if keep is not None:  # faults that were only recorded
                idx, vals = idx[keep], vals[keep]
        self.rows(es, vec)[idx] = vals

    def _bytes(self, flat, size):
        return flat[:, None] + np.arange(size)

    def _oob(self, S, flat, lanes, size, ins, what):
        inside = (flat >= 0) & (flat + size <= self.limit)
        b = np.clip(self._bytes(flat, size), 0, self.limit - 1)
        fl = self.flag[b]
        bad = ~inside | ((fl & ALLOC) == 0).any(1)
        if bad.any():
            S.report(
                self.oob_kind,
                bad,
                flat,
                lanes,
                self,
                ins,
                f"{what} of {size} bytes outside every {self.name} allocation",
            )
        return b, fl, ~bad

    def _quick(self, flat, size, mask, want, add, slow):
        """Whole-access version of the slow paths: True if every byte is as wanted (then marked)."""
        es = min(size, 8)
        k = ("f", slow is self.slow_l, size)
        r = self._rows.get(k)
        if r is None:
            r = tuple(a.view(_U[es]).reshape(-1, size // es) for a in (self.flag, slow))
            self._rows[k] = r
        fr, sr = r
        idx = flat >> _LG[size]
        fl = np.take(fr, idx, 0, mode="clip")
        if ((fl & _rep(mask, es)) != _rep(want, es)).any():
            return False
        fr[idx] = fl | _rep(add, es)
        sr[idx] = 0
        return True

    def slow_load(self, S, flat, lanes, size, ins):
        if self._quick(flat, size, ALLOC | INIT | INFLIGHT, ALLOC | INIT, LOADED, self.slow_l):
            return
        b, fl, there = self._oob(S, flat, lanes, size, ins, "load")
        un = ((fl & INIT) == 0) & there[:, None]
        if un.any():
            S.report(self.uninit_kind, un.any(1), flat, lanes, self, ins, f"read of uninitialised {self.name} memory")
        fly = (fl & INFLIGHT) != 0
        if fly.any():
            S.report(
                "async_not_waited",
                fly.any(1),
                flat,
                lanes,
                self,
                ins,
                "read of shared memory that a cp.async still in flight will write",
            )
        ok = b[~un & ~fly & there[:, None]]
        self.flag[ok] |= LOADED
        self.slow_l[ok] = 0

    def slow_store(self, S, flat, lanes, size, ins):
        if self._quick(flat, size, ALLOC | RO | INFLIGHT, ALLOC, INIT | STORED, self.slow_s):
            return
        b, fl, there = self._oob(S, flat, lanes, size, ins, "store")
        ro = (fl & RO) != 0
        if ro.any():
            S.report("readonly", ro.any(1), flat, lanes, self, ins, "store to constant memory")
        fly = (fl & INFLIGHT) != 0
        if fly.any():
            S.report(
                "async_not_waited",
                fly.any(1),
                flat,
                lanes,
                self,
                ins,
                "store to shared memory that a cp.async still in flight will write",
            )
        keep = there & ~ro.any(1)
        ok = b[~fly & keep[:, None]]
        self.flag[ok] |= INIT | STORED
        self.slow_s[ok] = 0
        return None if keep.all() else keep

    def misaligned(self, S, flat, lanes, size, ins):
        bad = (flat & (size - 1)) != 0
        S.report(
            "misaligned", bad, flat, lanes, self, ins, f"{self.name} access of {size} bytes is not aligned to {size}"
        )

    def set_inflight(self, flat, size, on):
        b = self._bytes(flat, size).ravel()
        if on:
            self.flag[b] |= INFLIGHT
            self.slow_l[b] = 1
            self.slow_s[b] = 1
        else:
            self.flag[b] &= 255 ^ INFLIGHT


def _rep(byte, es):
    return _U[es](int.from_bytes(bytes([byte]) * es, "little"))


_LG = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4, 32: 5}


class DevPtr(int):
    """A device address; an int (so it packs into structs) that remembers its buffer."""

    def __new__(cls, addr, mem=None, nbytes=0):
        o = int.__new__(cls, addr)
        o.mem, o.nbytes = mem, nbytes
        return o

    def read(self, dtype=np.uint8, shape=None):
        a = self.mem.read(int(self), self.nbytes).view(dtype)
        return a if shape is None else a.reshape(shape)

    def write(self, array):
        self.mem.write(int(self), array)


def raw_bytes(a):
    """Contiguous uint8 copy of a numpy array or a torch CPU tensor."""
    if hasattr(a, "detach"):
        import torch

        t = a.detach().contiguous()
        return t.view(torch.uint8).reshape(-1).numpy() if t.numel() else np.zeros(0, np.uint8)
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


class Memory:
    """Global memory of the simulated device."""

    GUARD = 512

    def __init__(self, capacity=1 << 26):
        self.base = GLOBAL_BASE
        self._reserve(capacity)
        self.top = self.high = 0  # the end of what is in use, now and at most since memory was given back
        self.blocks = {}  # offset -> nbytes
        self._bump(self.GUARD)

    def _reserve(self, cap):
        old = getattr(self, "data", None)
        arrs = [np.zeros(cap, np.uint8) for _ in range(4)]
        if old is not None:
            for n, o in zip(arrs, (self.data, self.flag, self.slow_l, self.slow_s)):
                n[: self.top] = o[: self.top]
        self.data, self.flag, self.slow_l, self.slow_s = arrs
        self.cap = cap

    def _bump(self, n):
        new = self.top + n
        if new > self.cap:
            self._reserve(max(2 * self.cap, -(-new // (1 << 20)) * (1 << 20)))
        self.data[self.top : new] = POISON
        self.flag[self.top : new] = 0
        self.slow_l[self.top : new] = 1
        self.slow_s[self.top : new] = 1
        self.top = new
        self.high = max(self.high, new)

    def _alloc(self, nbytes, shift=0):
        off = self.top + shift
        self._bump(-(-max(nbytes + shift, 1) // 512) * 512 + self.GUARD)
        self.flag[off : off + nbytes] = ALLOC
        self.blocks[off] = nbytes
        return off

    def alloc(self, array, init=True, readonly=False, shift=0):
        """Copy an array (numpy or torch CPU) to the device; returns its DevPtr. With an int, or with
        init=False, the buffer is uninitialised: reading it before a store is reported. Buffers are
        aligned to 512 bytes, plus `shift`."""
        if isinstance(array, (int, np.integer)) and not isinstance(array, bool):
            nbytes, src, init = int(array), None, False
        else:
            src = raw_bytes(array)
            nbytes = src.size
        off = self._alloc(nbytes, shift)
        if init:
            self.data[off : off + nbytes] = src
            self.flag[off : off + nbytes] |= INIT
        if readonly:
            self.flag[off : off + nbytes] |= RO
        return DevPtr(self.base + off, self, nbytes)

    def empty(self, nbytes):
        return self.alloc(int(nbytes))

    def zeros(self, nbytes):
        return self.alloc(np.zeros(int(nbytes), np.uint8))

    def write(self, addr, array):
        src = raw_bytes(array)
        off = int(addr) - self.base
        self.data[off : off + src.size] = src
        self.flag[off : off + src.size] |= INIT

    def read(self, addr, nbytes):
        off = int(addr) - self.base
        return self.data[off : off + nbytes].copy()

    def unwritten(self, addr, nbytes):
        """How many of the bytes hold no value yet (uninitialised)."""
        off = int(addr) - self.base
        return int(np.count_nonzero((self.flag[off : off + nbytes] & INIT) == 0))

    def free(self, addr):
        off = int(addr) - self.base
        n = self.blocks.pop(off)
        self.flag[off : off + n] = 0
        self.slow_l[off : off + n] = 1
        self.slow_s[off : off + n] = 1
        self.data[off : off + n] = POISON
        self.top = max(
            (-(-(o + max(m, 1)) // 512) * 512 + self.GUARD for o, m in self.blocks.items()), default=self.GUARD
        )
        if self.high - self.top > 1 << 28:  # a large launch is over
            self._give_back()
            self.high = self.top

    def _give_back(self):
        """Return the host's memory above the top."""
        self._reserve(max(self.top, 1 << 26))

    def begin_launch(self):
        n = self.top
        self.slow_l[:n] = 1
        self.slow_s[:n] = 1
        self.flag[:n] &= 255 ^ (LOADED | STORED)

    def space(self):
        sp = Space("global", ("oob", "uninit_global"))
        n = -(-self.top // 512) * 512
        if n > self.cap:
            self._reserve(self.cap * 2)
        self.slow_l[self.top : n] = 1
        self.slow_s[self.top : n] = 1
        sp.bind(self.data[:n], self.flag[:n], self.slow_l[:n], self.slow_s[:n])
        return sp

    def touched(self):
        f = self.flag[: self.top]
        return (
            int(np.count_nonzero(f & LOADED)),
            int(np.count_nonzero(f & STORED)),
            int(np.count_nonzero(f & (LOADED | STORED))),
        )
