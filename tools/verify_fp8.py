"""Fake quantization to FP8 against the casts of torch and of ml_dtypes, bit by bit.

python tools/verify_fp8.py [--values 10000000] [--json FILE]
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from qdq.cli.main import PositiveInt, run_command
from qdq.files import write_json
from qdq.formats import FP8, scale_from_amax
from qdq.quantize import fake_quantize
from qdq.run import describe_environment

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_RANGES = (448.0, 3.3, 1e-3, 6e4)
_PIECE = 1 << 20


def verify_fp8(*, values: PositiveInt = 10_000_000, json: Path | None = None) -> int:
    """Compare each result with both casts, for each type and range.

    Args:
        values: Random values for each type and range; all ties and their neighbours are added.
        json: Also write the figures to this file.
    """
    rows = []
    for name, dtype in _TYPES.items():
        for amax in _RANGES:
            count, differences = _compare(values, dtype, amax)
            rows.append({"type": name, "amax": amax, "values": count, "differences": differences})
            print(f"{name:5} amax {amax:<8g} {count:>10} values, {differences} differences")
    if json:
        write_json(json, {"rows": rows, "environment": describe_environment()})
    return int(any(row["differences"] for row in rows))


def _compare(values: int, dtype: torch.dtype, amax: float) -> tuple[int, int]:
    """The number of values, and how many of them differ from a cast."""
    generator = torch.Generator().manual_seed(0)
    count = 0
    differences = 0
    for start in range(0, values, _PIECE):
        size = min(_PIECE, values - start)
        # Magnitudes over 40 octaves, so that subnormal and clipped values are among them.
        octaves = 40 * torch.rand(size, generator=generator) - 30
        random = torch.randn(size, generator=generator) * amax * octaves.exp2()
        piece = torch.cat([random, _edges(amax)]) if start == 0 else random
        inputs = piece.clamp(-6.5e4, 6.5e4).to(dtype)
        count += len(inputs)
        differences += _count_differences(inputs, amax)
    return count, differences


def _edges(amax: float) -> torch.Tensor:
    """All codes and ties with their neighbours in float32, and values beyond the range, on both sides of 0."""
    codes = np.array([*FP8.list_magnitudes(), 464, 480, 1e4])
    ties = (codes[1:] + codes[:-1]) / 2
    scale = scale_from_amax(np.float32(amax), FP8)
    edges = (np.concatenate([codes, ties]) * scale).astype(np.float32)
    above = np.nextafter(edges, np.float32(np.inf))
    below = np.nextafter(edges, np.float32(-np.inf))
    positive = np.concatenate([edges, above, below])
    return torch.from_numpy(np.concatenate([positive, -positive]))


def _count_differences(inputs: torch.Tensor, amax: float) -> int:
    """How many results differ in a bit from one of the two casts."""
    result = fake_quantize(inputs, torch.tensor(amax), FP8)
    scale = torch.tensor(amax) / 448
    ratio = (inputs.float() / scale).clamp(-448, 448)
    by_torch = (ratio.to(torch.float8_e4m3fn).float() * scale).to(inputs.dtype)
    codes = ratio.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    by_numpy = torch.from_numpy(codes * scale.numpy()).to(inputs.dtype)
    bits = torch.int32 if inputs.dtype == torch.float32 else torch.int16
    is_equal = torch.ones(len(inputs), dtype=torch.bool)
    for expected in (by_torch, by_numpy):
        is_equal &= result.view(bits) == expected.view(bits)
    return int((~is_equal).sum())


if __name__ == "__main__":
    run_command(verify_fp8)
