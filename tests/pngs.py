"""PNG files of every colour type and depth, written from numbers, and what they look like on white paper."""

import struct
import zlib
from pathlib import Path

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
DEPTHS = {GREY: (1, 2, 4, 8, 16), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16), RGB_ALPHA: (8, 16)}
_ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def write(path: Path, samples: np.ndarray, kind: int, depth: int, interlaced: bool, **chunks: bytes) -> None:
    """Write samples ``[H, W, channels]`` of ``depth`` bits."""
    height, width, _ = samples.shape
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlaced)
    passes = [samples[y::dy, x::dx] for y, x, dy, dx in _ADAM7] if interlaced else [samples]
    lines = b"".join(b"\0" + _packed(row.ravel(), depth) for part in passes if part.size for row in part)
    everything = {"IHDR": header, **chunks, "IDAT": zlib.compress(lines), "IEND": b""}
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name.encode(), data) for name, data in everything.items()))


def _packed(values: np.ndarray, depth: int) -> bytes:
    if depth == 16:
        return values.astype(">u2").tobytes()
    bits = np.unpackbits(values.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :]
    return np.packbits(bits).tobytes()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def example(path: Path, kind: int, depth: int, transparent: bool, interlaced: bool) -> np.ndarray:
    """Write a file of 13 × 11 random pixels, and return them as 8-bit RGB on white, as real numbers."""
    rng = np.random.default_rng(0)
    largest = 2**depth - 1
    samples = rng.integers(0, largest + 1, (11, 13, CHANNELS[kind]))
    samples[:2] = largest // 3  # what is transparent below; white would not be seen
    # Of 16 bits the upper ones are taken.
    values = (samples >> 8).astype(float) if depth == 16 else samples * (255 / largest)
    alpha, chunks = np.ones((11, 13, 1)), dict[str, bytes]()
    if kind == PALETTE:
        palette = rng.integers(0, 256, (largest + 1, 3))
        values, chunks = palette[samples[:, :, 0]].astype(float), {"PLTE": palette.astype(np.uint8).tobytes()}
        if transparent:
            alphas = rng.integers(0, 256, largest + 1)
            alpha, chunks["tRNS"] = alphas[samples] / 255, alphas.astype(np.uint8).tobytes()
    elif kind in (GREY_ALPHA, RGB_ALPHA):
        values, alpha = values[:, :, :-1], values[:, :, -1:] / 255
    elif transparent:
        chunks["tRNS"] = samples[0, 0].astype(">u2").tobytes()
        alpha = 1.0 - (samples == samples[0, 0]).all(2, keepdims=True)
    write(path, samples, kind, depth, interlaced, **chunks)
    return np.broadcast_to(values * alpha + 255 * (1 - alpha), (11, 13, 3))


# Each colour type and depth, with a colour or palette that is transparent and without.
KINDS = [
    (kind, depth, transparent)
    for kind, depths in DEPTHS.items()
    for depth in depths
    for transparent in ([False, True] if kind in (GREY, RGB, PALETTE) else [False])
]
