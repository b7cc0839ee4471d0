"""From instructions to closures: operand access and masked writes.

A decoder is a function (b, ins) -> closure(S). Closures hold the register arrays themselves, so
running an instruction costs one Python call plus its numpy work."""

from __future__ import annotations
import numpy as np
from .errors import PtxUnsupported
from .parser import Reg, Imm, Sym, Vec, Pair, Not, Addr, TYPE_SIZE
from .numeric import bf_to_f32

DECODERS = {}

VIEW = {
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "tf32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "u16x2": np.uint32,
    "s16x2": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
    "f32x2": np.uint64,
    "pred": np.bool_,
}
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SINT = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


def op(*names):
    def deco(fn):
        for n in names:
            DECODERS[n] = fn
        return fn

    return deco


def unsupported(ins, why=""):
    raise PtxUnsupported(
        f"PTX line {ins.line}: `{ins.opcode}` is not supported" + (f" ({why})" if why else "") + f": {ins.text}"
    )


def imm_array(o, typ):
    """A 1-element array of the view type of `typ`."""
    dt = np.dtype(VIEW[typ])
    if typ == "pred":
        return np.array([bool(o.value)])
    if o.kind == "i":
        if typ in ("f32", "f64", "f16", "tf32") and not isinstance(o.value, bool):
            # an integer literal for a float type is its bit pattern (b-typed immediates) in asm
            return np.array([o.value & ((1 << (8 * dt.itemsize)) - 1)], UINT[dt.itemsize]).view(dt)
        return np.array([o.value & ((1 << (8 * dt.itemsize)) - 1)], UINT[dt.itemsize]).view(dt)
    if o.kind == "f":
        if dt.itemsize == 4:
            return np.array([o.value], np.uint32).view(dt)
        x = np.array([o.value], np.uint32).view(np.float32)
        if dt.itemsize == 8 and dt.kind == "f":
            return x.astype(np.float64)
        return np.array([o.value], UINT[dt.itemsize]).view(dt)
    x = np.array([o.value], np.uint64)
    if dt.itemsize == 8:
        return x.view(dt)
    return x.view(np.float64).astype(np.float32).view(dt) if dt.itemsize == 4 else x.view(np.float64).astype(dt)


class Binder:
    def __init__(self, S, frame, layout):
        self.S, self.frame, self.layout = S, frame, layout
        self.rf = S.regs[frame.id]
        self.types = frame.func.regs

    # ---- operands ------------------------------------------------------------------------------
    def const(self, o):
        """A register that is set once, to an immediate, stands for that immediate."""
        if isinstance(o, Reg):
            return self.layout.constants(self.frame).get(o.name, o)
        return o

    def raw(self, o):
        """The array of a register as declared (unsigned, bool, or special)."""
        t = self.types.get(o.name)
        if t is None:
            sp = self.S.special.get(o.name)
            if sp is None:
                if o.name == "WARP_SZ":
                    return np.full(self.S.T, 32, np.uint32)
                raise PtxUnsupported(f"unknown register {o.name}")
            return sp
        return self.rf.get(o.name, t)

    def src(self, o, typ, full=False):
        """Operand as an array of VIEW[typ] over the lanes (immediates: one element, or T if full)."""
        o = self.const(o)
        if isinstance(o, Reg):
            a = self.raw(o)
            dt = np.dtype(VIEW[typ])
            if a.dtype == dt:
                return a
            if a.dtype == np.bool_ or dt == np.bool_:
                raise PtxUnsupported(f"predicate used as {typ}: {o.name}")
            n, m = a.dtype.itemsize, dt.itemsize
            if n == m:
                return a.view(dt)
            if n > m:  # low part of a wider register
                return a.view(dt)[:: n // m]
            raise PtxUnsupported(f"register {o.name} is narrower than {typ}")
        if isinstance(o, Imm):
            a = imm_array(o, typ)
        elif isinstance(o, Sym):
            if o.name == "WARP_SZ":
                a = np.array([32], VIEW[typ])
            else:
                a = np.array([self.layout.address(o.name, self.frame) + o.off], np.uint64)
                dt = np.dtype(VIEW[typ])
                a = a.astype(UINT[dt.itemsize]).view(dt)
        else:
            raise PtxUnsupported(f"operand {o!r}")
        return np.broadcast_to(a, (self.S.T,)).copy() if full else a

    def dst(self, o, typ):
        """Destination array with dtype VIEW[typ]; a wider register is returned in its own width,
        signed if typ is signed, so that assignment extends."""
        if isinstance(o, Pair):
            o = o.a
        if isinstance(o, Reg):
            if o.name == "_":
                return None
            a = self.raw(o)
            dt = np.dtype(VIEW[typ])
            if a.dtype == np.bool_:
                return a
            n = a.dtype.itemsize
            if n == dt.itemsize:
                return a.view(dt)
            if n > dt.itemsize:
                return a.view(SINT[n] if dt.kind == "i" else UINT[n])
            raise PtxUnsupported(f"register {o.name} is narrower than {typ}")
        if isinstance(o, Sym) and o.name == "_":
            return None
        raise PtxUnsupported(f"destination {o!r}")

    def pred(self, ins):
        """None, or a function giving the bool array of the guard."""
        if ins.pred is None:
            return None
        p = self.raw(ins.pred[0])
        if ins.pred[1]:
            return lambda: ~p
        return lambda: p

    def psrc(self, o):
        """Predicate operand -> function giving the bool array."""
        if isinstance(o, Not):
            p = self.raw(o.a)
            return lambda: ~p
        if isinstance(o, Imm):
            v = np.full(self.S.T, bool(o.value))
            return lambda: v
        p = self.raw(o)
        return lambda: p

    # ---- closures ----------------------------------------------------------------------------
    def emit(self, ins, d, fn):
        """d <- fn() on the active lanes."""
        p = self.pred(ins)
        copyto = np.copyto
        if d is None:
            return lambda S: None
        if p is None:

            def f(S):
                if S.full:
                    copyto(d, fn(), "unsafe")
                else:
                    copyto(d, fn(), "unsafe", S.mask)
        else:

            def f(S):
                copyto(d, fn(), "unsafe", p() if S.full else p() & S.mask)

        return f

    def emit_uf(self, ins, d, uf, *args):
        """d <- uf(*args) for a ufunc whose result dtype is d's."""
        if d is None or ins.pred is not None or d.base is not None and d.strides[0] != d.itemsize:
            return self.emit(ins, d, lambda: uf(*args))
        copyto = np.copyto
        if len(args) == 2:
            x, y = args

            def f(S):
                if S.full:
                    uf(x, y, out=d, casting="unsafe")
                else:
                    copyto(d, uf(x, y), "unsafe", S.mask)
        else:
            (x,) = args

            def f(S):
                if S.full:
                    uf(x, out=d, casting="unsafe")
                else:
                    copyto(d, uf(x), "unsafe", S.mask)

        return f

    def emit_multi(self, ins, ds, fn):
        """Several destinations <- fn() (a sequence of arrays, computed before any write)."""
        p = self.pred(ins)

        def f(S):
            vals = fn()
            m = None if S.full else S.mask
            if p is not None:
                m = p() if m is None else p() & m
            for d, v in zip(ds, vals):
                if d is not None:
                    if m is None:
                        np.copyto(d, v, "unsafe")
                    else:
                        np.copyto(d, v, "unsafe", m)

        return f

    def active(self, ins):
        """Function (S) -> lanes: None if every lane of the batch is active, else their indices."""
        p = self.pred(ins)
        if p is None:
            return lambda S: S.path.lanes()

        def f(S):
            m = p() & S.mask
            n = np.count_nonzero(m)
            return None if n == m.size else m.nonzero()[0]

        return f


def type_of(ins, default=None):
    for m in reversed(ins.mods):
        if m in TYPE_SIZE:
            return m
    if default is None:
        unsupported(ins, "no type")
    return default
