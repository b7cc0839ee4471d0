"""mma.sync: products and sums in f64, one rounding to the accumulator type."""

from __future__ import annotations
import numpy as np
from .binder import op, unsupported
from .numeric import bf_to_f32, direct32
from .parser import Vec

u16, u32, u64 = np.uint16, np.uint32, np.uint64
f16, f32, f64 = np.float16, np.float32, np.float64
LANE = np.arange(32)
G, TG = LANE >> 2, LANE & 3
BITS = {"tf32": 32, "f16": 16, "bf16": 16, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}


def a_index(nreg, kp, K):
    """For A (16 x K): flat positions row*K+col of every (lane, reg, element)."""
    r, j = np.arange(nreg)[None, :, None], np.arange(kp)[None, None, :]
    row = G[:, None, None] + 8 * (r & 1)
    col = TG[:, None, None] * kp + j + (r >> 1) * (4 * kp)
    return (row * K + col).reshape(-1)


def b_index(nreg, kp, K):
    """For B (K x 8)."""
    r, j = np.arange(nreg)[None, :, None], np.arange(kp)[None, None, :]
    row = TG[:, None, None] * kp + j + r * (4 * kp)
    return (row * 8 + G[:, None, None] + 0 * row).reshape(-1)


def c_index():
    r = np.arange(4)[None, :]
    return ((G[:, None] + 8 * (r >> 1)) * 8 + TG[:, None] * 2 + (r & 1)).reshape(-1)


def decode(words, t):
    """(W, lanes*regs) u32 -> (W, lanes*regs*kp) f64 (or int64)."""
    if t == "tf32":
        return (words & u32(0xFFFFE000)).view(f32).astype(f64)
    if t == "f16":
        return words.view(f16).astype(f64)
    if t == "bf16":
        return bf_to_f32(words.view(u16)).astype(f64)
    if t in ("e4m3", "e5m2"):
        from .ops_cvt import _FP8

        return _FP8[t][words.view(np.uint8)]
    return words.view(np.int8 if t == "s8" else np.uint8).astype(f64)


def round_acc(S, y):
    if S.launch.mma_round == "rz":
        return direct32(y, np.zeros_like(y), "rz")
    return y.astype(f32)


@op("mma")
def mma(b, ins):
    shape = next(m for m in ins.mods if m[0] == "m" and m[1].isdigit())
    types = [m for m in ins.mods if m in BITS or m in ("f32", "s32", "f64")]
    if "sp" in ins.mods or any(m.startswith("sp::") for m in ins.mods) or ins.pred is not None:
        unsupported(ins)
    if "row" not in ins.mods or "col" not in ins.mods:
        unsupported(ins)
    dt, at, bt, ct = types
    ops = [list(o.items) if isinstance(o, Vec) else [o] for o in ins.ops[:4]]
    if at == "f64":
        return mma_f64(b, ins, shape, ops)
    if not shape.startswith("m16n8k") or at not in BITS:
        unsupported(ins)
    K = int(shape[6:])
    kp = 32 // BITS[at]
    na, nb = len(ops[1]), len(ops[2])
    if na * kp * 32 != 16 * K or nb * kp * 32 != 8 * K:
        unsupported(ins, "operand count does not fit the shape")
    S = b.S
    W = S.W
    A = [b.src(o, "b32", True) for o in ops[1]]
    B = [b.src(o, "b32", True) for o in ops[2]]
    C = [b.src(o, "b32", True) for o in ops[3]]
    D = [b.dst(o, "b32") for o in ops[0]]
    ia, ib, ic = a_index(na, kp, K), b_index(nb, kp, K), c_index()
    inva, invb = np.argsort(ia), np.argsort(ib)
    half_d, half_c, int_d = dt == "f16", ct == "f16", dt == "s32"
    flops = 2 * 16 * 8 * K
    satf = "satfinite" in ins.mods

    def gather(regs):
        return np.stack([r.reshape(W, 32) for r in regs], 2).reshape(W, -1)  # (W, 32*nreg)

    def fn():
        a = decode(gather(A), at).take(inva, 1).reshape(W, 16, K)
        x = decode(gather(B), bt).take(invb, 1).reshape(W, K, 8)
        with np.errstate(all="ignore"):
            y = np.matmul(a, x).reshape(W, 128).take(ic, 1).reshape(W, 32, 4)
            c = gather(C)
            if half_c:
                c = c.view(f16)
            elif int_d:
                c = c.view(np.int32)
            else:
                c = c.view(f32)
            y = y + c.reshape(W, 32, 4)
        if int_d:
            y = np.clip(y, -(2**31), 2**31 - 1) if satf else y
            r = y.astype(np.int64).astype(u32)
        elif half_d:
            r = np.ascontiguousarray(y.astype(f16)).view(u32)
        else:
            r = round_acc(S, y).view(u32)
        S.stats.mma += S.path.nw
        S.stats.mma_flops += flops * S.path.nw
        return [np.ascontiguousarray(r[:, :, k]).reshape(-1) for k in range(r.shape[2])]

    return b.emit_multi(ins, D, fn)


def mma_f64(b, ins, shape, ops):
    if shape != "m8n8k4":
        unsupported(ins)
    S = b.S
    W = S.W
    a, x = b.src(ops[1][0], "f64", True), b.src(ops[2][0], "f64", True)
    C = [b.src(o, "f64", True) for o in ops[3]]
    D = [b.dst(o, "f64") for o in ops[0]]

    def fn():
        y = np.matmul(a.reshape(W, 8, 4), x.reshape(W, 8, 4).transpose(0, 2, 1))  # (W, 8, 8)
        y = y.reshape(W, 8, 4, 2)
        S.stats.mma += S.path.nw
        S.stats.mma_flops += 512 * S.path.nw
        return [y[:, :, :, k].reshape(-1) + C[k] for k in range(2)]

    return b.emit_multi(ins, D, fn)
