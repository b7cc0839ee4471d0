"""Function -> linear code with calls expanded in line -> basic blocks.

Each call site gets its own copy of the callee (its own registers), so a `call` is a jump and
a `ret` a jump back; recursion and indirect calls are refused."""

from __future__ import annotations
from dataclasses import dataclass, field
from .parser import Instr, Label, Sym, Paren, Reg, Pair, Vec, Addr, Not
from .errors import PtxUnsupported, PtxParseError

# instructions that need the lanes of their warp together
WARP_SYNC = {"shfl", "vote", "match", "redux", "mma", "ldmatrix", "stmatrix", "wgmma", "movmatrix", "elect"}
BUILTIN_CALLS = {"vprintf", "__assertfail"}


@dataclass
class Frame:
    id: int
    func: object
    params: dict = field(default_factory=dict)  # formal name -> (frame, actual variable name)


@dataclass
class BB:
    index: int
    ins: list = field(default_factory=list)  # (Instr, Frame)
    kind: str = ""  # '' | 'warp' | 'group' (warpgroup) | 'bar'
    term: tuple = ("fall",)  # fall | bra | brx | exit
    next: int = -1
    spin: int = 0  # >0: taking this block's back edge may be a spin
    pure: bool = False  # that loop only loads: it changes nothing


def is_barrier(ins):
    if ins.op == "bar" or ins.op == "barrier":
        return "warp" not in ins.mods and "cluster" not in ins.mods
    return False


def is_warp_sync(ins):
    if ins.op == "bar" and "warp" in ins.mods:
        return True
    if ins.op in WARP_SYNC:
        return ins.op not in ("vote", "shfl", "match") or "sync" in ins.mods
    return False


class _Expander:
    def __init__(self, mod):
        self.mod, self.out, self.frames, self.nlab = mod, [], [], 0

    def label(self):
        self.nlab += 1
        return ("_", self.nlab)

    def expand(self, func, frame, ret, stack):
        body = func.body
        for k, item in enumerate(body):
            if isinstance(item, Label):
                self.out.append(("label", (frame.id, item.name)))
                continue
            ins = item
            if ins.op == "call":
                self.call(ins, frame, stack)
            elif ins.op == "ret":
                if ret is None:
                    self.out.append(("exit", ins, frame))
                else:
                    self.out.append(("bra", ins, frame, ret))
            elif ins.op == "exit":
                self.out.append(("exit", ins, frame))
            elif ins.op == "bra":
                self.out.append(("bra", ins, frame, (frame.id, ins.ops[0].name)))
            elif ins.op == "brx":
                tab = func.tables.get(ins.ops[1].name)
                if tab is None:
                    raise PtxParseError(f"line {ins.line}: unknown branch table {ins.ops[1].name}")
                self.out.append(("brx", ins, frame, [(frame.id, n) for n in tab]))
            else:
                self.out.append(("ins", ins, frame))
        if ret is None:
            self.out.append(("exit", None, frame))

    def call(self, ins, frame, stack):
        ops = list(ins.ops)
        rets = ops.pop(0).items if ops and isinstance(ops[0], Paren) else ()
        if not ops or not isinstance(ops[0], Sym):
            raise PtxUnsupported(f"line {ins.line}: indirect call `{ins.text}`")
        name = ops.pop(0).name
        args = ops.pop(0).items if ops and isinstance(ops[0], Paren) else ()
        callee = self.mod.functions.get(name)
        if callee is None or not callee.has_body:
            if name in BUILTIN_CALLS:
                self.out.append(("builtin", ins, frame, name, args, rets))
                return
            raise PtxUnsupported(f"line {ins.line}: call to {name}, which has no body in this module")
        if name in stack:
            raise PtxUnsupported(f"line {ins.line}: recursive call to {name}")
        fr = Frame(len(self.frames), callee)
        self.frames.append(fr)
        for formal, actual in list(zip(callee.params, args)) + list(zip(callee.rets, rets)):
            fr.params[formal.name] = (frame, actual.name)
        end = self.label()
        if ins.pred is not None:
            inv = Instr("bra", (), [], (ins.pred[0], not ins.pred[1]), ins.line, ins.text, ins.src)
            self.out.append(("bra", inv, frame, end))
        self.expand(callee, fr, end, stack + (name,))
        self.out.append(("label", end))


def link(mod, func):
    """Returns (frames, [BB])."""
    ex = _Expander(mod)
    root = Frame(0, func)
    ex.frames.append(root)
    ex.expand(func, root, None, (func.name,))
    targets = set()
    for it in ex.out:
        if it[0] == "bra":
            targets.add(it[3])
        elif it[0] == "brx":
            targets.update(it[3])
    bbs, where = [], {}
    cur = None

    def start():
        nonlocal cur
        if cur is None or cur.ins or cur.kind or cur.term[0] != "fall":
            cur = BB(len(bbs))
            bbs.append(cur)

    start()
    for it in ex.out:
        k = it[0]
        if k == "label":
            if it[1] in targets:
                start()
                where[it[1]] = cur.index
        elif k == "ins":
            ins = it[1]
            if is_barrier(ins):
                start()
                cur.kind = "bar"
                cur.ins.append((ins, it[2]))
                start()
            elif is_warp_sync(ins):
                start()
                cur.kind = "group" if ins.op == "wgmma" else "warp"
                cur.ins.append((ins, it[2]))
            else:
                cur.ins.append((ins, it[2]))
        elif k == "builtin":
            cur.ins.append(it[1:])
        else:
            cur.term = it
            cur = BB(len(bbs))
            bbs.append(cur)
    for b in bbs:
        b.next = b.index + 1
        t = b.term
        if t[0] == "bra":
            b.term = ("bra", t[1], t[2], where[t[3]])
        elif t[0] == "brx":
            b.term = ("brx", t[1], t[2], [where[x] for x in t[3]])
    _mark_spins(bbs)
    return ex.frames, bbs


def _mark_spins(bbs):
    """A back edge whose loop holds an atomic or a volatile/acquire/relaxed load may be a wait on
    other threads; the scheduler lets others run after `spin` turns."""
    for b in bbs:
        if b.term[0] != "bra" or b.term[3] > b.index:
            continue
        n, sync, store, pure = 0, False, False, True
        for x in bbs[b.term[3] : b.index + 1]:
            if x.kind == "bar":
                store = True
            for e in x.ins:
                ins = e[0]
                n += 1
                if ins.op in ("atom", "red", "st", "bar", "barrier", "cp") or (
                    ins.op == "mbarrier" and "wait" not in ins.mods[0]
                ):
                    pure = False
                if ins.op in ("atom", "red", "nanosleep", "mbarrier") or (
                    ins.op == "ld" and {"volatile", "acquire", "relaxed", "mmio"} & set(ins.mods)
                ):
                    sync = True
                elif ins.op == "st":
                    store = True
        if sync:
            b.spin = 1 if n <= 24 and not store else 64
            b.pure = pure


def reads_of(ins):
    """Names of registers that an instruction reads (conservative, used for dead atomics)."""
    out = set()

    def walk(o):
        if isinstance(o, Reg):
            out.add(o.name)
        elif isinstance(o, Addr):
            walk(o.base)
            for e in o.extra:
                walk(e)
        elif isinstance(o, (Vec, Paren)):
            for e in o.items:
                walk(e)
        elif isinstance(o, Pair):
            walk(o.a)
            walk(o.b)
        elif isinstance(o, Not):
            walk(o.a)

    first = (
        0
        if ins.op
        in (
            "st",
            "red",
            "bra",
            "brx",
            "call",
            "cp",
            "bar",
            "barrier",
            "stmatrix",
            "mbarrier",
            "prefetch",
            "wgmma",
            "trap",
        )
        else 1
    )
    for o in ins.ops[first:]:
        walk(o)
    if first == 1 and ins.ops and isinstance(ins.ops[0], Addr):
        walk(ins.ops[0])
    if ins.pred is not None:
        out.add(ins.pred[0].name)
    return out


def writes_of(ins):
    """Names of registers that an instruction may write (conservative: every register in operand 0,
    or anywhere for calls)."""
    out = set()

    def walk(o):
        if isinstance(o, Reg):
            out.add(o.name)
        elif isinstance(o, (Vec, Paren)):
            for e in o.items:
                walk(e)
        elif isinstance(o, Pair):
            walk(o.a)
            walk(o.b)

    for o in ins.ops if ins.op == "call" else ins.ops[:1]:
        walk(o)
    return out
