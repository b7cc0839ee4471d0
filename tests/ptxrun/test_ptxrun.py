"""Self-test of ptxrun: CUDA kernels (tests_data/kernels.cu) and Triton kernels against numpy in
float64, and planted faults that must be reported.  Run: make test-gpu-kernels"""

import math
import os
import sys

import numpy as np
import pytest
import torch
import triton

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import ptxrun  # noqa: E402
from ptxrun import Out, CheckError, pack_struct  # noqa: E402
from ptxrun.meter import Cache  # noqa: E402

pytestmark = pytest.mark.slow
rng = np.random.default_rng(7)
f32, i32, u32, f64 = np.float32, np.int32, np.uint32, np.float64
_mods = {}


def module_for(arch):
    if arch not in _mods:
        _mods[arch] = ptxrun.compile_cuda(os.path.join(HERE, "tests_data", "kernels.cu"), arch)
    return ptxrun.load(_mods[arch])


@pytest.fixture(params=["sm_80", "sm_90"])
def mod(request):
    return module_for(request.param)


CHECK = dict(race=True, race_global=True)


def close(a, b, rel):
    a, b = np.asarray(a, f64), np.asarray(b, f64)
    err = np.abs(a - b).max() / max(np.abs(b).max(), 1e-300)
    assert err <= rel, f"relative error {err:.3g} > {rel}"


# ---- CUDA -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("order", ["forward", "random"])
def test_reduce(mod, order):
    x, o = rng.standard_normal(100003).astype(f32), np.zeros(1, f32)
    r = mod.launch("reduce_sum", 37, 256, [x, o, x.size], atomic_order=order, block_order=order, **CHECK)
    assert abs(o[0] - x.astype(f64).sum()) < 1e-6 * np.abs(x.astype(f64)).sum()
    s = r.stats
    assert s.global_load_bytes == x.nbytes and s.unique_load_bytes == x.nbytes + 4
    assert s.barriers == 37 and s.atomics == 37 and s.load_efficiency > 0.99
    assert s.opcodes["ld.global.f32"] == x.size


def test_scan(mod):
    x = rng.integers(-50, 50, 5000).astype(i32)
    y = np.zeros(5000, i32)
    mod.launch("scan_block", math.ceil(5000 / 512), 512, [x, Out(y), 5000], **CHECK)
    ref = np.concatenate([np.cumsum(x[k : k + 512]) for k in range(0, 5000, 512)])
    assert (y == ref).all()


def test_histogram(mod):
    x = (rng.integers(0, 256, 20011) * rng.random(20011)).astype(np.uint8)
    h, t, mx = np.zeros(256, u32), np.zeros(1, np.uint64), np.zeros(1, i32)
    mod.launch("histogram", 9, 256, [x, h, t, mx, x.size], **CHECK)
    assert (h == np.bincount(x, minlength=256)).all() and t[0] == x.size and mx[0] == x.max()


def test_transpose(mod):
    n = 96
    x, y = rng.standard_normal((n, n)).astype(f32), np.zeros((n, n), f32)
    r = mod.launch("transpose4", (3, 3), (8, 32), [x, Out(y), n], **CHECK)
    assert (y == x.T).all() and r.unwritten == {1: 0}
    assert r.stats.load_efficiency == 1 and r.stats.traffic_ratio() == 1


def test_divergent(mod):
    x = rng.integers(1, 100000, 777).astype(u32)
    y = np.zeros(777, i32)
    mod.launch("collatz", 4, 256, [x, y, 777], **CHECK)

    def ref(v):
        c, v = 0, int(v)
        while v != 1:
            if v & 1:
                v = 3 * v + 1
                c += 1000 * (v % 5 == 0)
            else:
                v >>= 1
            c += 1
            if c > 2000000:
                break
            c += {3: 7, 5: -3, 6: 2}.get(v & 7, 0)
        return c

    assert (y == [ref(v) for v in x]).all()


def test_coop_groups(mod):
    n = 5000
    a, out = rng.standard_normal(n).astype(f32), np.zeros(3, f32)
    ref = a.astype(f64)
    refs = []
    for _ in range(3):
        refs.append(ref.sum())
        ref = ref - ref.sum() / n + 1
    mod.launch("coop_two_phase", 12, 128, [a, out, n], cooperative=True, race=True, race_global="strict")
    close(a, ref, 3e-6)
    close(out, refs, 1e-4)


@pytest.mark.parametrize("cooperative", [True, False])
def test_hand_barrier(mod, cooperative):
    nb, nt = 13, 64
    n = nb * nt
    a, b, bar = rng.standard_normal(n).astype(f32), np.zeros(n, f32), np.zeros(2, u32)
    i = np.arange(n)
    rb, ra = np.zeros(n, f32), a.copy()
    rb[(i + nt) % n] = a
    ra[(i + nt + 5) % n] = rb * 2
    ref = ra[(i + 7) % n]
    mod.launch("coop_hand", nb, nt, [a, b, bar], cooperative=cooperative, max_steps=200000, **CHECK)
    assert (b == ref).all()


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_last_block(mod, order):
    x = rng.standard_normal(9999).astype(f32)
    part, cnt, out = np.zeros(20, f32), np.zeros(1, u32), np.zeros(1, f32)
    mod.launch("last_block", 20, 256, [x, part, cnt, out, x.size], batch=3, block_order=order, **CHECK)
    close(out, np.abs(x.astype(f64)).sum(), 1e-6)
    assert cnt[0] == 0


def test_half(mod):
    n = 500
    a, b = (torch.from_numpy(rng.standard_normal(2 * n).astype(f32) * 3).half() for _ in range(2))
    c, d = (torch.from_numpy(rng.standard_normal(2 * n).astype(f32) * 3).bfloat16() for _ in range(2))
    o, p = torch.zeros(8 * n).half(), torch.zeros(8 * n).bfloat16()
    mod.launch("half_math", 4, 128, [a, b, Out(o), c, d, Out(p), n], **CHECK)
    x, y, o = a.double().view(n, 2), b.double().view(n, 2), o.view(n, 4, 2)
    assert torch.equal(o[:, 0], (x * y + x).half()) and torch.equal(o[:, 1], (x + y).half())
    assert torch.equal(o[:, 2], (x * y).half()) and torch.equal(o[:, 3], torch.maximum(x, -y).half())
    u, v, p = c.double().view(n, 2), d.double().view(n, 2), p.view(n, 4, 2)
    assert torch.equal(p[:, 0], (u * v + u).bfloat16()) and torch.equal(p[:, 1], (u - v).bfloat16())
    assert torch.equal(p[:, 2], (u * v).bfloat16()) and torch.equal(p[:, 3], torch.minimum(u, v.abs()).bfloat16())


def test_cvt(mod):
    n = 600
    x = (rng.standard_normal(n) * 10 ** rng.uniform(-6, 5, n)).astype(f32)
    x[:6] = [0.5, 1.5, 2.5, -0.5, 65519.9, 65520]
    h, b = torch.zeros(n).half(), torch.zeros(n).bfloat16()
    i1, i2, i3, i4 = np.zeros((n, 4), i32), np.zeros(n, u32), np.zeros(n, np.int64), np.zeros(n, np.int8)
    back, dd = np.zeros((n, 4), f32), np.zeros((n, 2), f64)
    mod.launch("cvt_all", 5, 128, [x, h, b, i1, i2, i3, i4, back, dd, n])
    t = torch.from_numpy(x)
    assert torch.equal(h, t.half()) and torch.equal(b, t.bfloat16())
    x64 = x.astype(f64)
    for k, fn in enumerate((np.rint, np.trunc, np.floor, np.ceil)):
        assert (i1[:, k] == fn(x64)).all()
    assert (i2 == np.maximum(np.trunc(x64), 0)).all() and (i3 == np.rint(x64)).all()
    assert (i4 == np.trunc(x64).astype(np.int64).astype(np.int8)).all()
    p = (i1[:, 0].astype(np.int64) * 1234567).astype(np.int32).astype(f64)
    z = p.astype(f32)
    z = np.where(np.abs(z.astype(f64)) > np.abs(p), np.nextafter(z, f32(0)), z)
    assert (back[:, 0] == z).all() and (back[:, 2] == h.float().numpy()).all()
    with np.errstate(over="ignore"):
        assert (back[:, 1] == (i3 * 123456789123).astype(f32)).all()
    s = x64 + f64(f32(1.2345))
    assert (np.abs(back[:, 3].astype(f64)) <= np.abs(s)).all() and (np.abs(back[:, 3] - s) <= np.abs(s) * 1.2e-7).all()
    assert (dd[:, 0] == x64 / 3.0).all()
    ref = [float(np.longdouble(v) * np.longdouble(1.0 / 3.0) + np.longdouble(1e-3)) for v in x64]
    assert np.mean(dd[:, 1] == ref) > 0.99


def test_fmath(mod):
    n = 700
    x, y = rng.uniform(-4, 4, n).astype(f32), rng.uniform(0.3, 3, n).astype(f32)
    o = np.zeros((n, 10), f32)
    mod.launch("fmath", 6, 128, [x, y, Out(o), n], **CHECK)
    a, b = x.astype(f64), y.astype(f64)
    ref = [
        a / b,
        np.sqrt(np.abs(a)),
        np.exp(a),
        np.log(b),
        np.sin((x * f32(100)).astype(f64)),
        np.abs(a) ** b,
        np.tanh(a),
        np.fmod(a, b),
        1 / np.sqrt(np.abs(a)),
        np.array([math.erf(v) for v in a]),
    ]
    for k, r in enumerate(ref):
        assert (np.abs(o[:, k] - r) <= 4e-7 * np.abs(r) + 2e-7 * (k in (3, 4))).all(), k


def test_imath(mod):
    n = 400
    x = rng.integers(-(2**31), 2**31, n).astype(i32)
    y = rng.integers(-(2**31), 2**31, n).astype(i32)
    x[:50] = rng.integers(-100, 100, 50)
    y[:90] = rng.integers(1, 60, 90)
    y[y == 0] = 5
    o = np.zeros((n, 16), np.int64)
    mod.launch("imath", 4, 128, [x, y, Out(o), n])
    M32, M64 = 2**32 - 1, 2**64 - 1

    def s(v, bits):
        v &= (1 << bits) - 1
        return v - (1 << bits) if v >> (bits - 1) else v

    def tdiv(a, b):
        q = abs(a) // abs(b)
        return q if (a < 0) == (b < 0) else -q

    for k in range(n):
        a, b = int(x[k]), int(y[k])
        ua, ub, la, lb = a & M32, b & M32, a * b, b * 77 + 1
        by = [(ua >> 8 * j) & 255 for j in range(4)] + [(ub >> 8 * j) & 255 for j in range(4)]
        sh = b & 31
        clz = 32 - ua.bit_length()
        ref = [
            tdiv(a, b),
            a - b * tdiv(a, b),
            ua // ub,
            ua % ub,
            tdiv(la, lb),
            la - lb * tdiv(la, lb),
            (a * b) >> 32,
            (ua * ub) >> 32,
            (la * lb) >> 64,
            bin(ua).count("1") + 100 * clz + 10000 * ((ua & -ua).bit_length()),
            int(f"{ua:032b}"[::-1], 2),
            by[4] | by[1] << 8 | by[7] << 16 | by[2] << 24,
            (((ub << 32 | ua) << sh) >> 32) & M32,
            s((la & M64) >> (ub & 63), 64),
            min(a, b) + max(ua, ub),
            s(bin(la & M64).count("1") + 100 * (64 - (lb & M64).bit_length()) + (a >> (b & 31)) + abs(a), 32),
        ]
        assert o[k].tolist() == ref, (k, a, b)


def test_radix_select(mod):
    x = rng.standard_normal(3001).astype(f32)
    for k in (1, 17, 1500, 3001):
        o = np.zeros(1, f32)
        mod.launch("radix_select", 1, 256, [x, Out(o), x.size, k], **CHECK)
        assert o[0] == np.sort(x)[::-1][k - 1]


def test_device_calls(mod):
    n, nb, nt = 100, 3, 128
    x, o = rng.standard_normal(n).astype(f32), np.zeros(nb * nt, f32)
    mod.launch("device_calls", nb, nt, [x, Out(o), n], **CHECK)

    def poly(a, d):
        s = 0.0
        for i in range(d):
            s = s * a + 1 / (i + 1)
        return s

    ref, px = np.zeros(nb * nt), np.zeros(nb * nt)
    for i in range(nb * nt):
        p = [float(x[i % n]), 0.5, 0.0, i % 5]
        for j in range(4):
            h = 0.1 if (i + j) & 1 else -0.05
            q = [p[0] + h * poly(p[1], p[3]), 0, 0, (p[3] + 1) % 6]
            q[1] = p[1] - h * p[0]
            q[2] = q[0] * q[1]
            p = q
        ref[i], px[i] = p[2] + p[3], p[0]
    ref += np.repeat(px.reshape(nb, nt).mean(1), nt)
    close(o, ref, 2e-6)


def test_struct_of_pointers(mod):
    sizes, chunk = [1000, 37, 512, 2049], 512
    ps = [rng.standard_normal(s).astype(f32) for s in sizes]
    gs = [rng.standard_normal(s).astype(f32) for s in sizes]
    dp, dg = [mod.mem.alloc(p) for p in ps], [mod.mem.alloc(g) for g in gs]
    blocks = [(t, c) for t, s in enumerate(sizes) for c in range(-(-s // chunk))]
    z = [0] * 4
    pad = [0] * (64 - len(blocks))
    tl = pack_struct(
        "8Q8Q8i64B64i", *dp, *z, *dg, *z, *sizes, *z, *[b[0] for b in blocks], *pad, *[b[1] for b in blocks], *pad
    )
    r = mod.launch("multi_tensor_axpy", len(blocks), 128, [tl, 0.125, chunk], **CHECK)
    for p, g, d in zip(ps, gs, dp):
        close(d.read(f32), p.astype(f64) - 0.125 * g.astype(f64), 1e-7)
    assert r.stats.unique_store_bytes == 4 * sum(sizes)


def test_dynamic_smem(mod):
    n = 96
    x, y = rng.standard_normal(4 * n).astype(f32), np.zeros(4 * n, f64)
    mod.launch("dyn_smem", 4, n, [x, Out(y), n], dynamic_smem=12 * n, **CHECK)
    v = x.reshape(4, n).astype(f64)
    close(y.reshape(4, n), 2 * v[:, ::-1] + np.roll(v, -1, 1), 1e-15)
    with pytest.raises(CheckError, match="oob"):
        mod.launch("dyn_smem", 4, n, [x, y, n], dynamic_smem=12 * n - 4)


def test_cp_async(mod):
    rows, cols = 5, 1900
    x, o = rng.standard_normal((rows, cols)).astype(f32), np.zeros(rows, f32)
    r = mod.launch("cp_async_rowsum", rows, 128, [x, o, rows, cols], **CHECK)
    assert (np.abs(o - x.astype(f64).sum(1)) < 1e-6 * np.abs(x).sum(1)).all()
    assert r.stats.global_load_bytes == x.nbytes


def test_mma_bf16(mod):
    M, N, Kd = 32, 64, 96
    a, b = (
        torch.from_numpy(rng.standard_normal((M, Kd)).astype(f32)).bfloat16(),
        torch.from_numpy(rng.standard_normal((N, Kd)).astype(f32)).bfloat16(),
    )
    c = np.zeros((M, N), f32)
    r = mod.launch("mma_bf16", (N // 32, M // 16), 128, [a, b, Out(c), M, N, Kd], **CHECK)
    close(c, (a.double() @ b.double().T).numpy(), 3e-7)
    assert r.stats.mma_flops == 2 * M * N * Kd


def test_mma_f16_trans(mod):
    Kd = 64
    a, b = rng.standard_normal((16, Kd)).astype(np.float16), rng.standard_normal((Kd, 8)).astype(np.float16)
    c = np.zeros((16, 8), f32)
    mod.launch("mma_f16_trans", 1, 32, [a, b, Out(c), Kd], **CHECK)
    close(c, a.astype(f64) @ b.astype(f64), 3e-7)


@pytest.mark.parametrize("k4", [0, 1])
def test_mma_tf32(mod, k4):
    Kd = 64
    a, b = rng.standard_normal((16, Kd)).astype(f32), rng.standard_normal((8, Kd)).astype(f32)
    c = np.zeros((16, 8), f32)
    mod.launch("mma_tf32", 1, 32, [a, b, Out(c), Kd, k4], **CHECK)

    def tf(v):
        return ((v.view(u32) + u32(0x1000)) & u32(0xFFFFE000)).view(f32).astype(f64)

    close(c, tf(a) @ tf(b).T, 3e-7)


def test_local_array(mod):
    n, t = 500, 200
    x, y = rng.integers(0, 1000, n).astype(i32), np.zeros((256, 9), i32)
    mod.launch("local_sort", 2, 128, [x, Out(y), n], **CHECK)
    i = np.arange(256)
    a = np.sort(x[(i[:, None] * 9 + np.arange(9)) % n], axis=1)
    assert (y == a + 10 * np.take_along_axis(a, (i[:, None] + np.arange(9)) % 9, 1)).all()


def test_warp_ops(mod):
    x = rng.integers(0, 10, 128).astype(i32)
    x[32:64] = 4
    o = np.zeros((128, 12), u32)
    mod.launch("warp_ops", 2, 64, [x, Out(o)], **CHECK)
    M = 0xFFFFFFFF
    for b in range(2):
        blk = x[64 * b : 64 * b + 64]
        for w in range(2):
            v = [int(t) for t in blk[32 * w : 32 * w + 32]]
            bal = lambda f: sum(1 << j for j in range(32) if f(v[j]))
            xor = 0
            for t in v:
                xor ^= (t * 2654435761) & M
            for l in range(32):
                p = o[64 * b + 32 * w + l]
                allm = len({t // 100 for t in v}) == 1
                half = range(16) if l < 16 else range(16, 32)
                if l < 16:
                    p8 = v[3] + sum(1 << j for j in half if v[j] & 1)
                else:
                    p8 = v[16 + 5] * 1000 + max(v[j] for j in half)
                ref = [
                    bal(lambda t: t > 3),
                    int(7 in v),
                    1,
                    bal(lambda t: t == v[l]),
                    (M + 1 if allm else 0) & M,
                    sum(v),
                    (min(v) - 4) & M,
                    xor,
                    p8,
                    bal(lambda t: t & 1) if v[l] & 1 else 0,
                    v[l + 3] if (l & 7) + 3 < 8 else v[l],
                    int((blk > 2).sum()) + 1000 * int((blk == 9).any()) + 10000,
                ]
                assert p.tolist() == ref, (b, w, l)


def test_locks_and_atomics(mod):
    nt, nb = 64, 3
    d, lock, c = np.zeros(2, f64), np.zeros(1, i32), np.zeros(1, i32)
    h, b, w = torch.zeros(2).half(), torch.zeros(2).bfloat16(), np.array([0, 0], u32)
    mod.launch(
        "locks", nb, nt, [d, lock, c, h, b, w], race_global=True, max_steps=2_000_000, checks={"race_global": "off"}
    )
    n = nt * nb
    assert d.tolist() == [1.5 * n, 0.25 * n] and c[0] == n and lock[0] == 0
    assert h.tolist() == [n, n / 2] and b.tolist() == [n, min(2 * n, 512)]
    assert w[0] == n % 10
    v = 0
    for _ in range(n):
        v = 6 if v == 0 or v > 6 else v - 1
    assert w[1] == v


def test_named_barriers(mod):
    n = 160
    x, y = rng.standard_normal(n).astype(f32), np.zeros(n, f32)
    mod.launch("named_barriers", 1, 64, [x, Out(y), n], **CHECK)
    assert (y.reshape(-1, 32) == (x * f32(3)).reshape(-1, 32)[:, ::-1]).all()


def test_const_printf_assert(mod):
    x, y = rng.standard_normal(32).astype(f32), np.zeros(32, f32)
    r = mod.launch("const_printf", 1, 32, [x, Out(y)])
    assert (y == x * np.tile(np.array([1.5, -2, 3.25, 0.5], f32), 8)).all()
    assert r.printf == f"t=0 v={x[0]:.3f} ok 0\nt=1 v={x[1]:.3f} ok {1 << 40}\n"
    assert mod.symbol("gcount").read(i32)[0] == 7
    x[5] = 2e30
    with pytest.raises(ptxrun.TrapError, match=r"x\[t\] < 1e30f"):
        mod.launch("const_printf", 1, 32, [x, y])


def test_meter():
    m = module_for("sm_80")
    x, y = np.zeros(2048, f32), np.zeros(128, f32)
    for gs, sectors in ((1, 4), (2, 8), (4, 16), (8, 32), (32, 32), (0, 1)):
        s = m.launch("meter_probe", 1, 32, [x, y, gs, 1]).stats
        assert (s.global_load_sectors, s.global_store_sectors, s.global_load_bytes) == (sectors, 4, 128)
    for ss, waves in ((1, 1), (2, 2), (3, 1), (4, 4), (8, 8), (32, 32), (33, 1)):
        s = m.launch("meter_probe", 1, 32, [x, y, 1, ss]).stats
        assert s.shared_wavefronts == 2 * waves and s.bank_conflicts == 2 * (waves - 1), (ss, s.shared_wavefronts)
    for ss, waves in ((1, 4), (2, 8), (4, 16), (8, 32), (3, 4)):
        s = m.launch("meter_probe4", 1, 32, [x, y, ss]).stats
        assert s.shared_wavefronts == 2 * waves and s.shared_ideal_wavefronts == 8, (ss, s.shared_wavefronts)
    assert s.global_load_sectors == 16 and s.unique_bytes == 1024 and s.traffic_ratio() == 1


def test_second_level_cache():
    m = module_for("sm_80")
    x, y = np.zeros(2048, f32), np.zeros(128, f32)
    # 32 lanes of 4 bytes: in 4 sectors of one line, or in 32 sectors of 32 lines; nothing is asked for twice.
    assert m.launch("meter_probe", 1, 32, [x, y, 1, 1], l2=1 << 20).stats.l2.missed_bytes == 4 * 32
    assert m.launch("meter_probe", 1, 32, [x, y, 32, 1], l2=1 << 20).stats.l2.missed_bytes == 32 * 32

    def missed(size, *accesses):
        cache = Cache(size)
        for first, count, kind in accesses:
            for flat in np.split(np.arange(first, first + count, 16), count // 128):
                cache.access(flat, 16, kind)
        return cache.missed_bytes

    twice = (0, 1024, "load"), (0, 1024, "load")
    assert missed(1024, *twice) == 1024  # as much as fits
    assert missed(1024 - 128, *twice) == 2048  # a line less: each has gone when it is wanted again
    assert missed(1024, (0, 1024, "store"), *twice) == 0
    assert missed(1024, (0, 1024, "load"), (0, 128, "load"), (1024, 128, "load"), (0, 128, "load")) == 1024 + 128
    cache = Cache(128)
    for flat in ([0], [32], [0, 96], [28]):
        cache.access(np.array(flat), 4, "load")
    assert cache.missed_bytes == 3 * 32


def test_libraries():
    """CUB radix sort / scan / reduce, cooperative-groups reductions, pipelines, cuda::barrier."""
    m = ptxrun.load(ptxrun.compile_cuda(os.path.join(HERE, "tests_data", "libs.cu"), "sm_80"))
    x, y, i = rng.standard_normal((3, 512)).astype(f32), np.zeros((3, 512), f32), np.zeros((3, 512), i32)
    m.launch("rsort", 3, 128, [x, Out(y), Out(i)], **CHECK)
    assert (y == -np.sort(-x, 1)).all() and (np.take_along_axis(x, i, 1) == y).all()
    x, y, z = rng.integers(-9, 99, (4, 256)).astype(i32), np.zeros((4, 256), i32), np.zeros(4, i32)
    m.launch("bscan", 4, 256, [x, Out(y), Out(z)], **CHECK)
    assert (y == np.cumsum(x, 1) - x).all() and (z == x.max(1)).all()
    x, y = rng.standard_normal(256).astype(f32), np.zeros(256, f32)
    m.launch("cgred", 2, 128, [x, Out(y), 0], **CHECK)
    p = x.reshape(-1, 32) > 0
    r = np.repeat(x.reshape(-1, 16).astype(f64).sum(1), 16).reshape(-1, 32) + np.where(
        p, 1001 * p.sum(1, keepdims=True), 0
    )
    close(y, r.ravel(), 1e-6)
    x = rng.standard_normal((5, 256)).astype(f32)
    m.launch("pipe_", 1, 256, [x, Out(y), 1280], **CHECK)
    close(y, x.astype(f64).sum(0), 1e-6)
    m.launch("cbar", 1, 256, [x, Out(y), 5], **CHECK)
    close(y, x.astype(f64)[:, ::-1].sum(0), 1e-6)


# ---- planted faults ---------------------------------------------------------------------------------
def finding(mod, kind, *a, **k):
    with pytest.raises(CheckError) as e:
        mod.launch(*a, **k)
    f = e.value.finding
    assert f.kind == kind, str(f)
    assert f.line > 0 and "kernels.cu" in f.src
    return f


def test_fault_oob(mod):
    x, y = np.ones(256, f32), np.zeros(250, f32)
    f = finding(mod, "oob", "bad_oob", 2, 128, [x, y, 0])
    assert f.block == (1, 0, 0) and f.thread == (122, 0, 0) and f.count == 6 and "argument 1 of 1000" in str(f)
    f = finding(mod, "oob", "bad_oob", 2, 128, [y, x, 0])
    assert "load" in f.message
    f = finding(mod, "oob", "bad_shared_oob", 1, 64, [x, 1])
    assert f.thread == (63, 0, 0)
    finding(mod, "oob", "bad_shared_oob", 1, 64, [x, -2000000])
    f = finding(mod, "oob", "bad_null", 1, 32, [None])
    assert "null" in f.message


def test_fault_race(mod):
    x, y = rng.standard_normal(128).astype(f32), np.zeros(128, f32)
    finding(mod, "race_shared", "bad_race", 1, 128, [x, y], race=True)
    finding(mod, "race_shared", "bad_race_war", 1, 128, [x, y], race=True)
    r = mod.launch("bad_race", 1, 128, [x, y], race=True, checks={"race_shared": "record"})
    assert [f.kind for f in r.findings] == ["race_shared"]


def test_warp_private_shared(mod):
    x, y = rng.standard_normal(128).astype(f32), np.zeros(128, f32)
    mod.launch("warp_private", 1, 128, [x, Out(y), 1], **CHECK)
    finding(mod, "race_shared", "warp_private", 1, 128, [x, Out(y), 0], race=True)


def test_fault_uninit(mod):
    y = np.zeros(64, f32)
    f = finding(mod, "uninit_shared", "bad_uninit_shared", 1, 64, [y])
    assert f.thread == (46, 0, 0) and f.count == 1
    finding(mod, "uninit_global", "bad_uninit_global", 1, 64, [Out(y), np.ones(64, f32)])
    mod.launch("bad_uninit_global", 1, 64, [y, np.ones(64, f32)])


def test_fault_misaligned(mod):
    x, y = np.ones(300, f32), np.zeros((64, 4), f32)
    mod.launch("bad_misaligned", 1, 64, [x, y, 4])
    f = finding(mod, "misaligned", "bad_misaligned", 1, 64, [x, y, 1])
    assert f.count == 64
    finding(mod, "misaligned", "bad_misaligned", 1, 64, [x[1:], y, 0])  # a view at an odd offset
    mod.launch("bad_misaligned", 1, 64, [x[1:], y, 3])


def test_recorded_faults_do_not_stop(mod):
    x, y = np.ones(256, f32), np.zeros(250, f32)
    r = mod.launch("bad_oob", 2, 128, [x, y, 0], checks={"oob": "record"})
    assert (y == 1).all() and [f.kind for f in r.findings] == ["oob"] and r.findings[0].count == 6


def test_odd_block_size(mod):
    x = rng.integers(1, 100000, 777).astype(u32)
    y, z = np.zeros(777, i32), np.zeros(777, i32)
    mod.launch("collatz", 8, 100, [x, y, 777], **CHECK)
    mod.launch("collatz", 4, 256, [x, z, 777], batch=1, **CHECK)
    assert (y == z).all()
    v, o = rng.standard_normal(5000).astype(f32), np.zeros(1, f32)
    mod.launch("reduce_sum", 3, (24, 4), [v, o, v.size])


def test_fault_cp_async(mod):
    x, y = np.arange(128, dtype=f32), np.zeros(128, f32)
    mod.launch("bad_cp_async", 1, 32, [x, y, 1])
    assert (y == x).all()
    f = finding(mod, "async_not_waited", "bad_cp_async", 1, 32, [x, y, 0])
    r = mod.launch("bad_cp_async", 1, 32, [x, y, 0], checks={"async_not_waited": "record", "uninit_shared": "off"})
    assert np.isnan(y).all() and r.findings


def test_fault_barrier_and_spin(mod):
    with pytest.raises(ptxrun.DeadlockError, match="barrier"):
        mod.launch("bad_barrier", 1, 64, [np.zeros(64, f32)])
    with pytest.raises(ptxrun.StepLimit):
        mod.launch("spin_forever", 1, 32, [np.zeros(1, i32), np.zeros(1, f32)], max_steps=5000)
    with pytest.raises(ptxrun.DeadlockError, match="spin"):
        mod.launch("spin_forever", 2, 40, [np.zeros(1, i32), np.zeros(1, f32)])


def test_fault_global_race(mod):
    x = rng.standard_normal(256).astype(f32)
    finding(mod, "race_global", "bad_global_race", 8, 1, [np.zeros(1, f32), x], race_global=True)
    xb, yb = torch.randn(256).bfloat16(), torch.zeros(256).bfloat16()
    mod.launch("bad_global_race_bf16", 4, 64, [yb, xb, 2], race_global=True)
    assert torch.equal(xb, yb)
    finding(mod, "race_global", "bad_global_race_bf16", 4, 64, [yb, xb, 1], race_global=True)
    finding(mod, "race_global", "bad_global_rmw", 2, 128, [np.zeros(8, f32), x], race_global=True)
    n = 256
    finding(mod, "race_global", "bad_missing_grid_sync", 4, 64, [np.zeros(n, f32), np.zeros(n, f32)], race_global=True)


def test_fault_missing_fence(mod):
    for fences in range(4):
        a, b, bar = np.zeros(64, f32), np.zeros(64, f32), np.zeros(1, u32)
        arg = ("bad_missing_fence", 2, 64, [a, b, bar, fences])
        if fences == 3:
            mod.launch(*arg, race_global="strict")
            assert (b == np.arange(64)).all()
        else:
            mod.launch(*arg, race_global=True)
            bar[:] = 0
            finding(mod, "race_global", *arg, race_global="strict")
    n = 13 * 64
    a, b, bar = rng.standard_normal(n).astype(f32), np.zeros(n, f32), np.zeros(2, u32)
    mod.launch("coop_hand", 13, 64, [a, b, bar], cooperative=True, race_global="strict")


def test_sm90_bulk_and_mbarrier():
    m = module_for("sm_90")
    nb, ch = 3, 5
    x, y = rng.standard_normal(nb * ch * 256).astype(f32), np.zeros(nb * 128, f32)
    r = m.launch("bulk_pipeline", nb, 128, [x, Out(y), ch, 0], **CHECK)
    v = x.reshape(nb, ch, 2, 128).astype(f64)
    close(y.reshape(nb, 128), (v[:, :, 0] + 2 * v[:, :, 1]).sum(1), 1e-6)
    assert r.stats.global_load_bytes == x.nbytes
    finding(m, "async_not_waited", "bulk_pipeline", nb, 128, [x, Out(y), ch, 1])
    x, y = np.arange(128, dtype=f32), np.zeros(128, f32)
    m.launch("mbar_cp_async", 1, 32, [x, Out(y)], **CHECK)
    t = np.arange(32)
    for j in range(4):
        assert (y[t + 32 * j] == x[127 - t - 32 * j]).all()


def test_unsupported_names_instruction():
    ptx = """.version 8.0
.target sm_90
.address_size 64
.visible .entry k(.param .u64 p)
{
 .reg .b64 %rd<3>;
 tex.2d.v4.f32.f32 {%f1,%f2,%f3,%f4}, [%rd1, {%f1, %f2}];
 ret;
}
"""
    with pytest.raises(NotImplementedError, match="line 7.*tex"):
        ptxrun.load(ptx).launch("k", 1, 1, [None])


def test_lane_outside_its_member_mask():
    text = """
extern "C" __global__ void k(int* x) {
    int v = x[threadIdx.x];
    x[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, v, 1);
}
"""
    m = ptxrun.load(ptxrun.compile_cuda_text(text))
    x = np.arange(32, dtype=i32)
    m.launch("k", 1, 16, [x[:16]], **CHECK)
    with pytest.raises(ptxrun.PtxError, match="outside its member mask.*thread .16, 0, 0."):
        m.launch("k", 1, 32, [x], **CHECK)


# ---- Triton -------------------------------------------------------------------------------------------
sys.path.insert(0, os.path.join(HERE, "tests_data"))
import triton_kernels as TK  # noqa: E402


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dt", [torch.float32, torch.bfloat16])
def test_t_row_l1(arch, dt):
    x = torch.randn(9, 1000).to(dt)
    y = torch.zeros(9)
    r = ptxrun.run_triton(TK.row_l1, (9,), [x, Out(y), 1000, x.stride(0)], dict(BLOCK=256), arch=arch, **CHECK)
    close(y.numpy(), x.double().abs().sum(1).numpy(), 3e-7)
    assert r.stats.unique_load_bytes == x.numel() * x.element_size() and r.stats.traffic_ratio() == 1


@pytest.mark.parametrize("arch", [80, 90])
def test_t_softmax(arch):
    x, y = torch.randn(6, 777) * 4, torch.zeros(6, 777)
    ptxrun.run_triton(TK.softmax, (6,), [x, Out(y), 777], dict(BLOCK=1024), arch=arch, **CHECK)
    close(y.numpy(), torch.softmax(x.double(), 1).numpy(), 2e-6)


def test_t_masked_strided():
    x, y = torch.randn(50, 70), torch.full((70, 50), -1.0)
    v = x[3:47, 5:66]
    ptxrun.run_triton(TK.masked_copy_t, (2, 2), [v, y, 44, 61, 70, 50], dict(BM=32, BN=32), **CHECK)
    assert torch.equal(y[:61, :44], v.T) and (y[61:] == -1).all() and (y[:, 44:] == -1).all()


@pytest.mark.parametrize(
    "dt,prec,tol",
    [
        ("fp32", "tf32", 2e-3),
        ("fp32", "ieee", 1e-6),
        ("fp32", "tf32x3", 2e-6),
        ("bf16", "ieee", 1e-6),
        ("fp16", "ieee", 1e-6),
    ],
)
def test_t_gemm(dt, prec, tol):
    td = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dt]
    M, N, Kd = 96, 80, 100 if dt == "fp32" else 104
    a, b, c = torch.randn(M, Kd).to(td), torch.randn(Kd, N).to(td), torch.zeros(M, N)
    ptxrun.run_triton(
        TK.gemm,
        (math.ceil(M / 32), math.ceil(N / 32)),
        [a, b, Out(c), M, N, Kd],
        dict(BM=32, BN=32, BK=32, PREC=prec),
        num_stages=3,
        **CHECK,
    )
    close(c.numpy(), (a.double() @ b.double()).numpy(), tol)
    if prec == "tf32":  # the hardware drops the low 13 bits of each operand

        def tr(t):
            return torch.from_numpy((t.numpy().view(u32) & u32(0xFFFFE000)).view(f32)).double()

        close(c.numpy(), (tr(a) @ tr(b)).numpy(), 1e-6)


@pytest.mark.parametrize(
    "dt,BM,BN,BK", [("fp32", 64, 64, 32), ("bf16", 64, 128, 64), ("bf16", 64, 32, 16), ("fp16", 128, 64, 32)]
)
def test_t_gemm_wgmma(dt, BM, BN, BK):
    td = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dt]
    M, N, Kd = 160, 136, 104
    a, b, c = torch.randn(M, Kd).to(td), torch.randn(Kd, N).to(td), torch.zeros(M, N)
    r = ptxrun.run_triton(
        TK.gemm,
        (math.ceil(M / BM), math.ceil(N / BN)),
        [a, b, Out(c), M, N, Kd],
        dict(BM=BM, BN=BN, BK=BK, PREC="tf32"),
        arch=90,
        **CHECK,
    )
    assert any("wgmma.mma_async" in o for o in r.stats.opcodes)
    close(c.numpy(), (a.double() @ b.double()).numpy(), 2e-3 if dt == "fp32" else 1e-6)


@pytest.mark.parametrize("dt", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arch", [80, 90])
def test_t_gram_abs_sum(dt, arch):
    n, Kd = 128, 96
    x, c, s = torch.randn(n, Kd).to(dt), torch.zeros(n, n), torch.zeros(n)
    ptxrun.run_triton(TK.gram_abs_sum, (2, 2), [x, Out(c), s, n, Kd], dict(BM=64, BK=32), arch=arch, **CHECK)
    g = (x.double() @ x.double().T).numpy()
    tol = 2e-3 if dt == torch.float32 else 1e-6
    close(c.numpy(), g, tol)
    close(s.numpy(), np.abs(g).sum(1), tol)


@pytest.mark.parametrize("order", ["forward", "random"])
def test_t_atomic(order):
    idx, v = torch.randint(0, 37, (1000,), dtype=torch.int32), torch.randn(1000)
    h, c = torch.zeros(37), torch.zeros(37, dtype=torch.int32)
    ptxrun.run_triton(TK.scatter_add, (4,), [idx, v, h, c, 1000], dict(BLOCK=256), atomic_order=order, **CHECK)
    ref = np.zeros(37)
    np.add.at(ref, idx.numpy(), v.double().numpy())
    close(h.numpy(), ref, 1e-6)
    assert (c.numpy() == np.bincount(idx.numpy(), minlength=37)).all()


def test_t_scan_sort():
    n = 512
    x = torch.randn(3, n)
    cs, so, am = torch.zeros(3, n), torch.zeros(3, n), torch.zeros(3, dtype=torch.int32)
    ptxrun.run_triton(TK.scan_sort, (3,), [x, Out(cs), Out(so), Out(am)], dict(N=n), **CHECK)
    close(cs.numpy(), x.double().cumsum(1).numpy(), 2e-6)
    assert torch.equal(so, x.sort(1).values) and torch.equal(am.long(), x.argmax(1))


@pytest.mark.parametrize("nprog", [1, 3])
def test_t_grouped(nprog):
    mem_shapes = [(40, 48), (64, 32), (16, 100)]
    Kd = 32
    As = [torch.randn(m, Kd).bfloat16() for m, n in mem_shapes]
    Bs = [torch.randn(Kd, n).bfloat16() for m, n in mem_shapes]
    k = ptxrun.compile_triton(
        TK.grouped, ["*u64", "*i32", "i32", "i32", "constexpr", "constexpr", "constexpr"], dict(BM=32, BN=32, KD=Kd)
    )
    m = ptxrun.load(k.ptx)
    pa, pb = [m.mem.alloc(a) for a in As], [m.mem.alloc(b) for b in Bs]
    pc = [m.mem.empty(4 * r * c) for r, c in mem_shapes]
    table = np.array([[int(x) for x in t] for t in zip(pa, pb, pc)], np.uint64)
    shp = np.array(mem_shapes, np.int32)
    m.launch(k.name, nprog, 32 * k.num_warps, [table, shp, 3, nprog, None, None], k.shared, **CHECK)
    for (r, c), a, b, p in zip(mem_shapes, As, Bs, pc):
        close(p.read(f32, (r, c)), (a.double() @ b.double()).numpy(), 1e-6)


@pytest.mark.parametrize("shape", [(128, 64, 96), (96, 80, 72)])
@pytest.mark.parametrize("dt", [torch.bfloat16, torch.float32])
def test_t_tma_gemm(dt, shape):
    M, N, Kd = shape
    a, b, c = torch.randn(M, Kd).to(dt), torch.randn(Kd, N).to(dt), torch.zeros(M, N)
    r = ptxrun.run_triton(
        TK.tma_gemm,
        (math.ceil(M / 64), math.ceil(N / 64)),
        [a, b, Out(c), M, N, Kd],
        dict(BM=64, BN=64, BK=32),
        arch=90,
        **CHECK,
    )
    close(c.numpy(), (a.double() @ b.double()).numpy(), 2e-3 if dt == torch.float32 else 1e-6)
    assert r.unwritten == {2: 0} and any("cp.async.bulk.tensor" in o for o in r.stats.opcodes)


@pytest.mark.parametrize("arch", [80, 90])
def test_t_attention(arch):
    n, d = 128, 64
    q, k, v = (torch.randn(n, d).half() for _ in range(3))
    o = torch.zeros(n, d)
    ptxrun.run_triton(TK.attention, (2,), [q, k, v, Out(o), n, 0.125], dict(D=d, BM=64, BN=32), arch=arch, **CHECK)
    close(o.numpy(), (torch.softmax(q.double() @ k.double().T * 0.125, 1) @ v.double()).numpy(), 2e-3)


def test_t_fault_oob():
    x, y = torch.randn(1000), torch.zeros(1000)
    with pytest.raises(CheckError) as e:
        ptxrun.run_triton(TK.bad_unmasked, (4,), [x, y], dict(BLOCK=256))
    assert e.value.finding.kind == "oob" and e.value.finding.block == (3, 0, 0)
    assert "triton_kernels.py" in e.value.finding.src


# ---- speed -------------------------------------------------------------------------------------------
def test_speed():
    m80 = module_for("sm_80")
    x, y = rng.standard_normal(256).astype(f32), np.zeros(256, f32)
    r = m80.launch("big_alu", 1, 256, [x, y, 2000])
    rate = r.stats.steps / r.stats.seconds
    print(f"\n256 threads: {rate:.0f} vector instructions/s ({rate * 256:.3g} thread instructions/s)")
    assert rate > 100_000
    x, y = rng.standard_normal(256 * 64).astype(f32), np.zeros(256 * 64, f32)
    r = m80.launch("big_alu", 64, 256, [x, y, 200])
    print(f"64 blocks: {r.stats.instructions / r.stats.seconds:.3g} thread instructions/s")
