"""Numbers of quantised blocks by ggml's layouts of bits, apart from the library that the converter uses."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind


def decode(data: np.ndarray, kind: Kind) -> np.ndarray:
    """Rows of raw bytes (or of F32, F16 numbers) as f32."""
    if kind in (Kind.F32, Kind.F16):
        return data.astype(np.float32)
    if kind is Kind.BF16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    blocks = data.reshape(-1, GGML_QUANT_SIZES[kind][1])
    return BLOCKS[kind](blocks).astype(np.float32).reshape(len(data), -1)


def half(blocks: np.ndarray, offset: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(np.float16).astype(np.float32)


def nibbles(packed: np.ndarray) -> np.ndarray:
    """All low halves of the bytes, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def q8_0(b):  # scale, 32 signed bytes
    return half(b, 0) * np.ascontiguousarray(b[:, 2:]).view(np.int8)


def q4_0(b):  # scale, 32 numbers of 4 bits around 8
    return half(b, 0) * (nibbles(b[:, 2:]) - 8)


def q4_1(b):  # scale, least, 32 numbers of 4 bits
    return half(b, 0) * nibbles(b[:, 4:]) + half(b, 2)


def q4_k(b):  # two scales, 8 × (6 bits of scale, 6 of least) in 12 bytes, 8 × 32 numbers of 4 bits
    packed, parts = b[:, 4:16].astype(np.int32), []
    for j in range(8):
        if j < 4:
            scale, least = packed[:, j] & 63, packed[:, j + 4] & 63
        else:
            scale = packed[:, j + 4] & 15 | packed[:, j - 4] >> 6 << 4
            least = packed[:, j + 4] >> 4 | packed[:, j] >> 6 << 4
        bytes_ = b[:, 16 + j // 2 * 32 :][:, :32]
        number = (bytes_ >> 4 if j % 2 else bytes_ & 15).astype(np.float32)
        parts.append(half(b, 0) * scale[:, None] * number - half(b, 2) * least[:, None])
    return np.concatenate(parts, axis=1)


def q6_k(b):  # 256 × 4 low bits, 256 × 2 high bits, 16 signed scales, a scale
    scales, parts = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32), []
    for j in range(8):  # runs of 32 numbers
        side, run = divmod(j, 4)
        low = b[:, side * 64 + run % 2 * 32 :][:, :32].astype(np.int32)
        low = low >> 4 if run >= 2 else low & 15
        high = b[:, 128 + side * 32 :][:, :32].astype(np.int32) >> 2 * run & 3
        parts.append(half(b, 208) * np.repeat(scales[:, 2 * j : 2 * j + 2], 16, axis=1) * ((low | high << 4) - 32))
    return np.concatenate(parts, axis=1)


BLOCKS = {Kind.Q8_0: q8_0, Kind.Q4_0: q4_0, Kind.Q4_1: q4_1, Kind.Q4_K: q4_k, Kind.Q6_K: q6_k}
