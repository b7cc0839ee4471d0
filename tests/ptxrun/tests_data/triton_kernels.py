"""Triton kernels of the self-test of ptxrun."""

import triton
import triton.language as tl


@triton.jit
def row_l1(x, y, n, stride, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    acc = tl.zeros((BLOCK,), tl.float32)
    for c in range(0, n, BLOCK):
        o = c + tl.arange(0, BLOCK)
        acc += tl.abs(tl.load(x + r * stride + o, mask=o < n, other=0.0).to(tl.float32))
    tl.store(y + r, tl.sum(acc, 0))


@triton.jit
def softmax(x, y, n, BLOCK: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    m = c < n
    v = tl.load(x + r * n + c, mask=m, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + r * n + c, e / tl.sum(e, 0), mask=m)


@triton.jit
def masked_copy_t(x, y, rows, cols, sx, sy, BM: tl.constexpr, BN: tl.constexpr):
    i = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    j = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    m = (i < rows) & (j < cols)
    v = tl.load(x + i * sx + j, mask=m)
    tl.store(y + j * sy + i, v, mask=m)


@triton.jit
def gemm(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(
            a + rm[:, None] * K + (k + rk)[None, :], mask=(rm[:, None] < M) & ((k + rk)[None, :] < K), other=0.0
        )
        y = tl.load(
            b + (k + rk)[:, None] * N + rn[None, :], mask=((k + rk)[:, None] < K) & (rn[None, :] < N), other=0.0
        )
        acc = tl.dot(x, y, acc, input_precision=PREC)
    tl.store(c + rm[:, None] * N + rn[None, :], acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def gram_abs_sum(x, c, s, n, K, BM: tl.constexpr, BK: tl.constexpr):
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BM), tl.float32)
    for k in range(0, K, BK):
        a = tl.load(x + rm[:, None] * K + (k + rk)[None, :])
        b = tl.load(x + rn[:, None] * K + (k + rk)[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    tl.store(c + rm[:, None] * n + rn[None, :], acc)
    tl.atomic_add(s + rm, tl.sum(tl.abs(acc), 1))


@triton.jit
def scatter_add(idx, v, h, cnt, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    i = tl.load(idx + o, mask=m, other=0)
    tl.atomic_add(h + i, tl.load(v + o, mask=m), mask=m)
    tl.atomic_add(cnt + i, 1, mask=m)


@triton.jit
def scan_sort(x, cs, so, am, N: tl.constexpr):
    r = tl.program_id(0)
    c = tl.arange(0, N)
    v = tl.load(x + r * N + c)
    tl.store(cs + r * N + c, tl.cumsum(v, 0))
    tl.store(so + r * N + c, tl.sort(v))
    tl.store(am + r, tl.argmax(v, 0))


@triton.jit
def grouped(table, shapes, groups, nprog, BM: tl.constexpr, BN: tl.constexpr, KD: tl.constexpr):
    tile = tl.program_id(0)
    done = 0
    for g in range(groups):
        m = tl.load(shapes + 2 * g)
        n = tl.load(shapes + 2 * g + 1)
        tm = tl.cdiv(m, BM)
        tn = tl.cdiv(n, BN)
        a = tl.load(table + 3 * g).to(tl.pointer_type(tl.bfloat16))
        b = tl.load(table + 3 * g + 1).to(tl.pointer_type(tl.bfloat16))
        c = tl.load(table + 3 * g + 2).to(tl.pointer_type(tl.float32))
        while tile < done + tm * tn:
            t = tile - done
            rm = (t // tn) * BM + tl.arange(0, BM)
            rn = (t % tn) * BN + tl.arange(0, BN)
            rk = tl.arange(0, KD)
            x = tl.load(a + rm[:, None] * KD + rk[None, :], mask=rm[:, None] < m, other=0.0)
            y = tl.load(b + rk[:, None] * n + rn[None, :], mask=rn[None, :] < n, other=0.0)
            tl.store(c + rm[:, None] * n + rn[None, :], tl.dot(x, y), mask=(rm[:, None] < m) & (rn[None, :] < n))
            tile += nprog
        done += tm * tn


@triton.jit
def tma_gemm(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    da = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    db = tl.make_tensor_descriptor(b, [K, N], [N, 1], [BK, BN])
    dc = tl.make_tensor_descriptor(c, [M, N], [N, 1], [BM, BN])
    pm = tl.program_id(0)
    pn = tl.program_id(1)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(da.load([pm * BM, k]), db.load([k, pn * BN]), acc)
    dc.store([pm * BM, pn * BN], acc)


@triton.jit
def attention(q, k, v, o, N, sc, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    m0 = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, D)
    qq = tl.load(q + m0[:, None] * D + d[None, :])
    acc = tl.zeros((BM, D), tl.float32)
    mi = tl.full((BM,), -float("inf"), tl.float32)
    li = tl.zeros((BM,), tl.float32)
    for n in range(0, N, BN):
        nn = n + tl.arange(0, BN)
        kk = tl.load(k + nn[:, None] * D + d[None, :])
        vv = tl.load(v + nn[:, None] * D + d[None, :])
        s = tl.dot(qq, tl.trans(kk)) * sc
        mn = tl.maximum(mi, tl.max(s, 1))
        p = tl.exp(s - mn[:, None])
        al = tl.exp(mi - mn)
        li = li * al + tl.sum(p, 1)
        acc = tl.dot(p.to(vv.dtype), vv, acc * al[:, None])
        mi = mn
    tl.store(o + m0[:, None] * D + d[None, :], acc / li[:, None])


@triton.jit
def bad_unmasked(x, y, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + o, tl.load(x + o) + 1.0)
