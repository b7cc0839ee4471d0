"""load(ptx) -> Module; Module.launch executes a kernel."""

from __future__ import annotations
import ctypes
import re
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
import numpy as np
from . import parser as P
from . import ops_int, ops_float, ops_cvt, ops_mem, ops_warp, ops_atom, ops_mma, ops_sm90  # noqa: F401
from .binder import Binder, DECODERS
from .errors import LaunchError, PtxUnsupported, TrapError, CheckError
from .link import link, reads_of, writes_of
from .machine import Batch, RegFile, SHARED_BASE, LOCAL_BASE
from .memory import Memory, DevPtr, GLOBAL_BASE, PARAM_WINDOW, INIT, raw_bytes
from .meter import Cache, Stats
from .ops_warp import member_mask
from .sched import Scheduler

# what happens on each kind of finding: 'raise', 'record' (in result.findings) or 'off'
DEFAULT_CHECKS = {
    "oob": "raise",
    "misaligned": "raise",
    "readonly": "raise",
    "uninit_global": "raise",
    "uninit_shared": "raise",
    "uninit_local": "off",
    "async_not_waited": "raise",
    "race_shared": "raise",
    "race_global": "raise",
}
SMEM_LIMIT = {
    "sm_70": 98304,
    "sm_75": 65536,
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_87": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_103": 232448,
    "sm_120": 101376,
}


@dataclass
class Out:
    """Argument wrapper: an output buffer whose old content the kernel must not read (poison)."""

    array: object


@dataclass
class Result:
    stats: Stats
    findings: list = field(default_factory=list)
    printf: str = ""
    unwritten: dict = field(default_factory=dict)  # index of an Out argument -> bytes never stored


class Layout:
    """Addresses of variables for one launch."""

    def __init__(self, launch, frames, T):
        self.launch, self.T = launch, T
        self.mod = launch.module
        self.param_bytes = launch.param_bytes
        self.calls, self.locals, self._reads = {}, {}, {}
        off = LOCAL_BASE
        for fr in frames:
            for v in fr.func.vars.values():
                if v.space == "local":
                    off = -(-off // v.align) * v.align
                    self.locals[(fr.id, v.name)] = off
                    off += v.size
                elif v.space == "param":
                    self.calls[(fr.id, v.name)] = np.zeros((T, max(v.size, 1)), np.uint8)
        self.local_bytes = off - LOCAL_BASE
        self.shared = launch.shared_layout

    def address(self, name, frame):
        v = frame.func.vars.get(name) or self.mod.ast.vars.get(name)
        if v is None:
            if frame.func.entry:
                for p in frame.func.params:
                    if p.name == name:
                        return p.offset
            raise PtxUnsupported(f"address of `{name}` (function {frame.func.name})")
        if v.space == "local":
            return self.locals[(frame.id, name)]
        if v.space == "shared":
            return self.shared[name]
        if v.space in ("global", "const"):
            return int(self.mod.symbols[name])
        raise PtxUnsupported(f"address of {v.space} variable `{name}`")

    def param(self, name, frame):
        """Bytes of a parameter: 1-D for kernel parameters, (T, size) for call parameters."""
        while True:
            if (frame.id, name) in self.calls:
                return self.calls[(frame.id, name)]
            if name in frame.params:
                frame, name = frame.params[name]
                continue
            break
        for p in frame.func.params:
            if p.name == name and frame.func.entry:
                return self.param_bytes[p.offset : p.offset + p.size]
        raise PtxUnsupported(f"parameter `{name}`")

    def constants(self, frame):
        f = frame.func
        c = getattr(f, "constants", None)
        if c is None:
            n, c = Counter(), {}
            for i in f.body:
                if isinstance(i, P.Instr):
                    for d in writes_of(i):
                        n[d] += 1
            for i in f.body:
                if (
                    isinstance(i, P.Instr)
                    and i.op == "mov"
                    and i.pred is None
                    and i.mods[-1] != "pred"
                    and isinstance(i.ops[0], P.Reg)
                    and isinstance(i.ops[1], P.Imm)
                    and n[i.ops[0].name] == 1
                    and P.TYPE_SIZE[i.mods[-1]] == P.TYPE_SIZE[f.regs.get(i.ops[0].name, "pred")]
                ):
                    c[i.ops[0].name] = i.ops[1]
            f.constants = c
        return c

    def is_read(self, frame, reg):
        f = frame.func
        r = self._reads.get(f.name)
        if r is None:
            r = set()
            for i in f.body:
                if isinstance(i, P.Instr):
                    r |= reads_of(i)
            self._reads[f.name] = r
        return reg in r


class Module:
    def __init__(self, ptx, mem=None):
        self.ptx = ptx
        self.ast = P.parse(ptx)
        self.mem = mem or Memory()
        self.symbols = {}
        self._linked = {}
        self._init_globals()

    @property
    def kernels(self):
        return [f.name for f in self.ast.functions.values() if f.entry]

    def _init_globals(self):
        for v in list(self.ast.vars.values()) + [v for f in self.ast.functions.values() for v in f.vars.values()]:
            if v.space not in ("global", "const"):
                continue
            data = np.zeros(max(v.size, 1), np.uint8)
            v.fix = []
            if v.init:
                es = P.TYPE_SIZE[v.type]
                for k, x in enumerate(v.init):
                    if isinstance(x, P.Sym):
                        v.fix.append((k * es, x))
                    else:
                        data[k * es : (k + 1) * es] = np.frombuffer(
                            (x.value & ((1 << 8 * es) - 1)).to_bytes(es, "little"), np.uint8
                        )
            self.ast.vars.setdefault(v.name, v)
            self.symbols[v.name] = self.mem.alloc(data, readonly=v.space == "const")
        for n, a in self.symbols.items():
            for off, s in getattr(self.ast.vars[n], "fix", ()):
                if s.name in self.symbols:
                    self.mem.write(int(a) + off, np.array([int(self.symbols[s.name]) + s.off], np.uint64))

    def symbol(self, name):
        """DevPtr of a .global / .const variable (mangled name)."""
        return self.symbols[name]

    def kernel(self, name):
        f = self.ast.functions.get(name)
        if f is None or not f.entry:
            hits = [k for k in self.kernels if name in k]
            if len(hits) != 1:
                raise LaunchError(f"kernel {name!r} not found; the module has {self.kernels}")
            f = self.ast.functions[hits[0]]
        return f

    def launch(self, name, grid, block, args, dynamic_smem=0, **kw):
        """Execute a kernel. `name` may be any unambiguous part of a kernel's name.

        args: numpy arrays / torch CPU tensors (copied in, and back out afterwards), Out(array)
        (same, but reading the old content is reported), DevPtr or int addresses, ints, floats,
        None (null pointer), bytes (struct by value).
        Options: cooperative=False, batch=None (blocks in lock step; None: chosen), block_order=
        'forward' | 'reverse' | 'random', atomic_order= (same), race=False, race_global=False (True, or 'strict': fences needed),
        meter=True, checks={kind: 'raise' | 'record' | 'off'}, max_steps=20_000_000,
        mma_round='rn' | 'rz', seed=0, nsm=132."""
        return Launch(self, self.kernel(name), grid, block, args, dynamic_smem, **kw).run()

    def linked(self, func):
        r = self._linked.get(func.name)
        if r is None:
            r = self._linked[func.name] = link(self.ast, func)
        return r


def load(ptx, mem=None) -> Module:
    """Parse PTX text (or a path to a .ptx file)."""
    if "\n" not in ptx and ptx.endswith(".ptx"):
        with open(ptx) as fh:
            ptx = fh.read()
    return Module(ptx, mem)


def _dim(x):
    x = (x,) if isinstance(x, (int, np.integer)) else tuple(int(v) for v in x)
    return x + (1,) * (3 - len(x))


class _Arrays:
    """Array arguments: copied to the device once per overlapping group, copied back after."""

    def __init__(self, mem):
        self.mem, self.items, self.groups = mem, [], []

    @staticmethod
    def span(a):
        if hasattr(a, "detach"):
            if a.device.type != "cpu":
                raise LaunchError("tensor arguments must be on the CPU")
            n = a.element_size()
            lo = a.data_ptr()
            hi = lo + (sum((s - 1) * st for s, st in zip(a.shape, a.stride())) + 1) * n if a.numel() else lo
            return lo, hi
        if a.size == 0:
            p = a.__array_interface__["data"][0]
            return p, p
        return np.lib.array_utils.byte_bounds(a)

    @staticmethod
    def offset(a, lo):
        """Byte offset of the array in the buffer it is a view of (kept modulo 512 on the device, so
        that views are as misaligned as they would be on a GPU)."""
        if hasattr(a, "detach"):
            return lo - a.untyped_storage().data_ptr()
        root = a
        while isinstance(root.base, np.ndarray):
            root = root.base
        return lo - np.lib.array_utils.byte_bounds(root)[0] if root.size else 0

    def add(self, a, out=False):
        lo, hi = self.span(a)
        self.items.append([a, lo, hi, out, self.offset(a, lo) % 512 if hi > lo else 0])
        return len(self.items) - 1

    def place(self, names):
        order = sorted(range(len(self.items)), key=lambda i: self.items[i][1])
        for i in order:
            _, lo, hi, out, shift = self.items[i]
            g = self.groups[-1] if self.groups else None
            if g is not None and lo < g[1]:
                g[1] = max(g[1], hi)
                g[2].append(i)
            else:
                self.groups.append([lo, hi, [i], None])
        addr = [0] * len(self.items)
        for g in self.groups:
            n = g[1] - g[0]
            raw = (
                np.ctypeslib.as_array((ctypes.c_uint8 * max(n, 1)).from_address(g[0]))[:n]
                if n
                else np.zeros(0, np.uint8)
            )
            init = not all(self.items[i][3] for i in g[2])
            g[3] = self.mem.alloc(raw, init=init, shift=self.items[g[2][0]][4])
            for i in g[2]:
                addr[i] = int(g[3]) + self.items[i][1] - g[0]
                names[addr[i]] = i
        return addr

    def back(self):
        for lo, hi, idx, ptr in self.groups:
            n = hi - lo
            if n:
                data = self.mem.read(ptr, n)
                ctypes.memmove(lo, data.ctypes.data, n)

    def free(self):
        for g in self.groups:
            self.mem.free(g[3])


class Launch:
    def __init__(
        self,
        module,
        func,
        grid,
        block,
        args,
        dynamic_smem=0,
        cooperative=False,
        batch=None,
        block_order="forward",
        atomic_order="forward",
        race=False,
        race_global=False,
        meter=True,
        checks=None,
        max_steps=20_000_000,
        mma_round="rn",
        seed=0,
        nsm=132,
        lanes=8192,
        cluster=(1, 1, 1),
        max_findings=50,
        blocks=None,
        l2=None,
    ):
        self.module, self.func, self.mem = module, func, module.mem
        self.grid, self.block = _dim(grid), _dim(block)
        self.dynamic_smem = int(dynamic_smem)
        self.cooperative, self.batch = cooperative, batch
        self.block_order, self.atomic_order = block_order, atomic_order
        self.race, self.race_global, self.meter = race, race_global, meter
        self.checks = dict(DEFAULT_CHECKS, **(checks or {}))
        self.max_steps, self.mma_round, self.nsm = max_steps, mma_round, nsm
        self.rng = np.random.default_rng(seed)
        self.lane_target, self.cluster = lanes, cluster
        self.max_findings = max_findings
        self.only_blocks = blocks
        self.stats = Stats()
        if l2 is not None:
            self.stats.l2 = Cache(l2)
        self.findings, self._seen = [], {}
        self.printed = []
        self.args = list(args)
        tpb = self.block[0] * self.block[1] * self.block[2]
        if not 1 <= tpb <= 1024 or min(self.grid) < 1:
            raise LaunchError(f"bad launch shape grid {self.grid} block {self.block}")
        d = func.directives
        want = d.get(".reqntid")
        if want and tuple(_dim(want)) != self.block:
            raise LaunchError(f"{func.name} requires block {want}, got {self.block}")
        mx = d.get(".maxntid")
        if mx and tpb > int(np.prod(mx)):
            raise LaunchError(f"{func.name} allows at most {mx} threads per block, got {tpb}")

    # ---- arguments --------------------------------------------------------------------------------
    def _pack(self):
        ps = self.func.params
        if len(self.args) != len(ps):
            raise LaunchError(f"{self.func.name} takes {len(ps)} parameters, got {len(self.args)}")
        self.arrays = _Arrays(self.mem)
        self.names = {}
        slots = {}
        for i, a in enumerate(self.args):
            out = isinstance(a, Out)
            if out:
                a = a.array
            if isinstance(a, np.ndarray) or hasattr(a, "detach"):
                slots[i] = self.arrays.add(a, out)
        addrs = self.arrays.place(self.names)
        back = {v: k for k, v in slots.items()}
        self.names = {ad: back[j] for ad, j in self.names.items()}
        self.addrs = {i: addrs[s] for i, s in slots.items()}
        size = ps[-1].offset + ps[-1].size if ps else 0
        buf = np.zeros(max(size, 8), np.uint8)
        for i, (p, a) in enumerate(zip(ps, self.args)):
            buf[p.offset : p.offset + p.size] = self._bytes(i, p, a)
        self.param_bytes = buf

    def _bytes(self, i, p, a):
        if i in self.addrs:
            v = struct.pack("<Q", self.addrs[i])
        elif isinstance(a, (bytes, bytearray, memoryview)):
            v = bytes(a)
        elif isinstance(a, (np.void,)) or (isinstance(a, ctypes.Structure)):
            v = bytes(a)
        elif a is None:
            v = bytes(p.size)
        elif isinstance(a, (bool, np.bool_)):
            v = int(a).to_bytes(p.size, "little")
        elif isinstance(a, (int, np.integer)):
            if p.type == "f32":
                v = struct.pack("<f", a)
            elif p.type == "f64":
                v = struct.pack("<d", a)
            else:
                v = (int(a) & ((1 << 8 * p.size) - 1)).to_bytes(p.size, "little")
        elif isinstance(a, (float, np.floating)):
            if p.size == 8:
                v = struct.pack("<d", a)
            elif p.size == 4:
                v = struct.pack("<f", a)
            else:
                v = np.float16(a).tobytes()
        else:
            raise LaunchError(f"argument {i} of {self.func.name}: cannot pass {type(a).__name__}")
        if len(v) != p.size:
            raise LaunchError(f"argument {i} of {self.func.name} ({p.type}, {p.size} bytes) got {len(v)} bytes")
        return np.frombuffer(v, np.uint8)

    # ---- shared memory ------------------------------------------------------------------------------
    def _shared(self, frames):
        lay, off, seen = {}, SHARED_BASE, set()
        vs = [v for v in self.module.ast.vars.values() if v.space == "shared"]
        for fr in frames:
            if fr.func.name not in seen:
                seen.add(fr.func.name)
                vs += [v for v in fr.func.vars.values() if v.space == "shared"]
        used = self._used_symbols(frames)
        al = 16
        for v in vs:
            if not v.extern and v.name in used and v.name not in lay:
                off = -(-off // v.align) * v.align
                lay[v.name] = off
                off += v.size
            elif v.extern:
                al = max(al, v.align)
        if self.dynamic_smem or any(v.extern and v.name in used for v in vs):
            off = -(-off // al) * al
        for v in vs:
            if v.extern:
                lay[v.name] = off
        self.static_smem = off - SHARED_BASE
        self.smem_bytes = off + self.dynamic_smem - SHARED_BASE
        self.shared_layout = lay
        m = re.match(r"sm_\d+", self.module.ast.target)
        lim = SMEM_LIMIT.get(m.group(0) if m else "", 232448)
        if self.smem_bytes > lim:
            raise LaunchError(
                f"{self.func.name} needs {self.smem_bytes} bytes of shared memory; {self.module.ast.target} has {lim}"
            )

    def _used_symbols(self, frames):
        used = set()

        def walk(o):
            if isinstance(o, P.Sym):
                used.add(o.name)
            elif isinstance(o, P.Addr):
                walk(o.base)
            elif isinstance(o, (P.Vec, P.Paren)):
                for x in o.items:
                    walk(x)

        for fr in frames:
            for it in fr.func.body:
                if isinstance(it, P.Instr):
                    for o in it.ops:
                        walk(o)
        return used

    # ---- running ------------------------------------------------------------------------------------
    def atomic_perm(self, n):
        if self.atomic_order == "forward":
            return None
        return np.arange(n)[::-1] if self.atomic_order == "reverse" else self.rng.permutation(n)

    def _bind(self, S, layout, frames, bbs):
        S.regs = {fr.id: RegFile(S.T) for fr in frames}
        binders = {fr.id: Binder(S, fr, layout) for fr in frames}
        code, guards = [], []
        sch = Scheduler(S, code, bbs, guards, self.max_steps)
        for bb in bbs:
            fs = []
            for e in bb.ins:
                ins, fr = e[0], e[1]
                b = binders[fr.id]
                try:
                    if len(e) > 2:
                        fs.append(self._builtin(b, ins, *e[2:]))
                        continue
                    dec = DECODERS.get(ins.op)
                    if dec is None:
                        raise PtxUnsupported(f"PTX line {ins.line}: `{ins.opcode}` is not supported: {ins.text}")
                    if bb.kind == "bar":
                        self._bar(sch, bb, b, ins)
                        fs.append(lambda S: None)
                        continue
                    if bb.kind in ("warp", "group") and not fs:
                        sch.need[bb.index] = member_mask(b, ins)
                    fs.append(dec(b, ins))
                except PtxUnsupported as x:
                    if f"line {ins.line}" not in str(x):
                        raise PtxUnsupported(f"PTX line {ins.line}: {x}: {ins.text}") from None
                    raise
                except Exception as x:
                    x.add_note(f"while decoding PTX line {ins.line}: {ins.text}")
                    raise
            code.append(fs)
            t = bb.term
            g = None
            if t[0] in ("bra", "exit") and t[1] is not None and t[1].pred is not None:
                g = binders[t[2].id].pred(t[1])
            elif t[0] == "brx":
                x = binders[t[2].id].src(t[1].ops[0], "u32", True)
                g = lambda x=x: x
            guards.append(g)
        return sch

    def _bar(self, sch, bb, b, ins):
        m = [x for x in ins.mods if x not in ("cta", "aligned")]
        kind = m[0]
        ops = list(ins.ops)
        if ins.pred is not None:
            raise PtxUnsupported(f"PTX line {ins.line}: predicated barrier `{ins.text}`")
        red = None
        if kind == "red":
            dst = ops.pop(0)
            p = b.psrc(ops.pop())
            how = m[1]
            d = b.raw(dst) if how != "popc" else b.dst(dst, "u32")

            def red(S, go):
                v = (p() & go).reshape(S.B, S.TP)
                g = go.reshape(S.B, S.TP)
                r = v.sum(1) if how == "popc" else v.any(1) if how == "or" else (v == g).all(1)
                np.copyto(d, np.repeat(r, S.TP), "unsafe", go)

        def val(o):
            if isinstance(o, P.Imm):
                return o.value
            a = b.src(o, "u32")
            return lambda: a

        bid = val(ops[0])
        count = val(ops[1]) if len(ops) > 1 else None
        sch.bar_info[bb.index] = (bid, count, kind == "arrive", red)

    def _builtin(self, b, ins, name, args, rets):
        bufs = [b.layout.param(a.name, b.frame) for a in args]
        ret = b.layout.param(rets[0].name, b.frame) if rets else None

        def cstr(a):
            off = a - GLOBAL_BASE
            d = self.mem.data[off : off + 4096].tobytes()
            return d[: d.index(0)].decode("utf8", "replace")

        def vprintf(S):
            lanes = S.path.lanes()
            for l in range(S.T) if lanes is None else lanes:
                fmt = cstr(int(bufs[0][l].view(np.int64)[0]))
                ap = int(bufs[1][l].view(np.int64)[0])
                self.printed.append(self._format(S, int(l), fmt, ap))
            if ret is not None:
                ret[:, :4] = 0

        def assertfail(S):
            lanes = S.path.lanes()
            if lanes is None or lanes.size:
                l = 0 if lanes is None else int(lanes[0])
                msg, file, fn = (cstr(int(bufs[k][l].view(np.int64)[0])) for k in (0, 1, 3))
                line = int(bufs[2][l].view(np.int32)[0])
                raise TrapError(f"device assert `{msg}` failed in {fn} ({file}:{line}) by block/thread {S.where(l)}")

        return vprintf if name == "vprintf" else assertfail

    def _format(self, S, lane, fmt, ap):
        from .memory import LOCAL_WINDOW

        pos = [ap]

        def read(n):
            pos[0] = -(-pos[0] // n) * n
            a = pos[0]
            pos[0] += n
            if a >= GLOBAL_BASE:
                return self.mem.data[a - GLOBAL_BASE : a - GLOBAL_BASE + n].tobytes()
            o = a - LOCAL_WINDOW + int(S.lo_base[lane])
            return S.lmem.data[o : o + n].tobytes()

        def sub(m):
            c, ln = m.group("c"), m.group("l") or ""
            if c == "%":
                return "%"
            spec = "%" + m.group("f")
            if c in "diuxXoc":
                big = "l" in ln or "z" in ln or "j" in ln
                v = int.from_bytes(read(8 if big else 4), "little", signed=c in "di")
                return (spec + ("d" if c in "diu" else c)) % v
            if c == "p":
                return hex(int.from_bytes(read(8), "little"))
            if c == "s":
                a = int.from_bytes(read(8), "little") - GLOBAL_BASE
                d = self.mem.data[a : a + 4096].tobytes()
                return (spec + "s") % d[: d.index(0)].decode("utf8", "replace")
            return (spec + c) % struct.unpack("<d", read(8))[0]

        return re.sub(r"%(?P<f>[-+ #0]*\d*(?:\.\d+)?)(?P<l>hh|h|ll|l|z|j)?(?P<c>[diuxXocpsfFeEgGaA%])", sub, fmt)

    def record(self, f):
        k = (f.kind, f.line)
        if k in self._seen:
            self._seen[k].count += f.count
            return
        self._seen[k] = f
        if len(self.findings) < self.max_findings:
            self.findings.append(f)

    def describe(self, a):
        """Where an address lies relative to the known buffers."""
        off = a - self.mem.base
        best = None
        for o, n in self.mem.blocks.items():
            d = 0 if o <= off < o + n else (o - off if off < o else off - (o + n) + 1)
            if best is None or d < best[0]:
                best = (d, o, n)
        if best is None or best[0] > 1 << 20:
            return " (null or wild pointer)"
        d, o, n = best
        who = self.names.get(o + self.mem.base)
        if who is None:
            sym = next((s for s, p in self.module.symbols.items() if int(p) == o + self.mem.base), None)
            nm = f"symbol {sym}" if sym else f"buffer at {o + self.mem.base:#x}"
        else:
            nm = f"argument {who}"
        if d == 0:
            return f" ({nm}, byte {off - o} of {n})"
        return f" ({nm} of {n} bytes: " + (
            f"{off - o - n} bytes past its end)" if off > o else f"{o - off} bytes before it)"
        )

    def run(self):
        t0 = time.perf_counter()
        self._pack()
        mark = None
        self.envregs = {k: 0 for k in range(32)}
        if self.cooperative:
            mark = self.mem.zeros(256)
            self.envregs[1], self.envregs[2] = int(mark) >> 32, int(mark) & 0xFFFFFFFF
        try:
            frames, bbs = self.module.linked(self.func)
            self._shared(frames)
            self.mem.begin_launch()
            self.gspace = self.mem.space()
            nb = int(np.prod(self.grid))
            ids = np.arange(nb) if self.only_blocks is None else np.asarray(self.only_blocks)
            if self.block_order == "reverse":
                ids = ids[::-1]
            elif self.block_order == "random":
                ids = self.rng.permutation(ids)
            tp = -(-int(np.prod(self.block)) // 32) * 32
            per = self.batch or max(1, self.lane_target // tp)
            if self.cooperative:
                per = len(ids)
            per = max(
                1,
                min(
                    per,
                    len(ids),
                    (256 << 20) // max(4 * (self.smem_bytes + 2048), 1) if not self.cooperative else len(ids),
                ),
            )
            self._execute(frames, bbs, ids, per)
            res = Result(self.stats, self.findings, "".join(self.printed))
            for i, a in enumerate(self.args):
                if isinstance(a, Out):
                    lo, hi = _Arrays.span(a.array)
                    res.unwritten[i] = self.mem.unwritten(self.addrs[i], hi - lo)
            self.arrays.back()
            st = self.stats
            st.unique_load_bytes, st.unique_store_bytes, st.unique_bytes = self.mem.touched()
            st.threads, st.blocks = len(ids) * int(np.prod(self.block)), len(ids)
        finally:
            self.arrays.free()
            if mark is not None:
                self.mem.free(mark)
        self.stats.seconds = time.perf_counter() - t0
        return res

    def _execute(self, frames, bbs, ids, per):
        from .race import SharedRace, GlobalRace

        S = sch = None
        grace = GlobalRace(self, bbs) if self.race_global else None
        for k in range(0, len(ids), per):
            part = ids[k : k + per]
            if S is None or S.B != len(part):
                self._finish(S, sch, bbs)
                lay = Layout(self, frames, len(part) * (-(-int(np.prod(self.block)) // 32) * 32))
                S = Batch(len(part), self.block, self.grid, self.smem_bytes, lay.local_bytes, self)
                if self.race:
                    S.race = SharedRace(S)
                S.grace = grace
                sch = self._bind(S, lay, frames, bbs)
            S.start(part)
            sch.run()
            self.stats.batches += 1
        self._finish(S, sch, bbs)

    def _finish(self, S, sch, bbs):
        """Count what a batch has executed, and let go of it: its closures refer to it, and Python's collector comes
        late for a cycle of few objects, though they hold up to hundreds of megabytes."""
        if sch is None:
            return
        st = self.stats
        st.steps += sch.steps
        for bb, nt, nw in zip(bbs, sch.nthreads, sch.nwarps):
            if nt:
                c = Counter(e[0].opcode for e in bb.ins)
                if bb.term[0] in ("bra", "brx", "exit") and bb.term[1] is not None:
                    c[bb.term[1].opcode] += 1
                for o, n in c.items():
                    st.opcodes[o] += n * int(nt)
                    st.warp_opcodes[o] += n * int(nw)
        vars(S).clear()
        vars(sch).clear()
