"""The cost of fake quantization on this CPU, side by side in one run, medians.

python tools/bench_forward.py [--repeats 9] [--json FILE]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import qdq
from qdq.cli.main import run_command
from qdq.files import write_json
from qdq.quantize import compute_scale, fake_quantize_in_pieces, fake_quantize_with_operator
from qdq.run import describe_environment


def bench_forward(*, repeats: int = 9, batch_size: int = 16, json: Path | None = None) -> int:
    """Time two methods for the same fake-quantized tensor, and EfficientNet-Lite0 in float and fake-quantized.

    Args:
        repeats: Runs of each; the median is shown.
        batch_size: Images per batch.
        json: Also write the figures to this file.
    """
    torch.manual_seed(0)
    tensor, images = torch.randn(batch_size, 32, 112, 112), torch.randn(batch_size, 3, 224, 224)
    scale = compute_scale(torch.tensor(3.0), qdq.Format())
    model = qdq.load_model().module
    with torch.inference_mode():
        milliseconds = {
            "one tensor, torch's operator": _median(
                lambda: fake_quantize_with_operator(tensor, scale, qdq.Format(), None), repeats
            ),
            "one tensor, in-place arithmetic": _median(
                lambda: fake_quantize_in_pieces(tensor, scale, qdq.Format(), None), repeats
            ),
        }
    qdq.fold_batchnorm(model, images[:2])
    with torch.inference_mode():
        milliseconds["EfficientNet-Lite0, float"] = _median(lambda: model(images), repeats)
    qdq.swap_modules(model, images[:2])
    qdq.calibrate_model(model, [images], method="max")
    with torch.inference_mode():
        milliseconds["EfficientNet-Lite0, fake-quantized"] = _median(lambda: model(images), repeats)
    for name, value in milliseconds.items():
        print(f"{value:8.1f} ms  {name}")
    if json:
        write_json(json, {"milliseconds": milliseconds, "environment": describe_environment()})
    return 0


def _median(run: Callable[[], object], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    run_command(bench_forward)
