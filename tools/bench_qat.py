"""The cost of a fine-tuning step against a float step, and the gain of fine-tuning on scikit-learn's digits.

python tools/bench_qat.py [--modelopt-python PATH] [--torchao-python PATH] [--digits] [--json FILE]

Steps are those of ResNet-18. Each tool is compared with the float model that it starts from, in one process and in
turns; times are CPU times of the process, medians. First a forward, a backward and an SGD step, which other tools have
too; then whole steps of `finetune` (Adam, clipped gradient, NaN check) against float steps with its optimizer and loss.
"""

from __future__ import annotations

import json as json_module
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import qdq
from qdq.cli.main import PositiveInt, run_command
from qdq.files import write_json
from qdq.qat.losses import Objective
from qdq.qat.trainer import Trainer, copy_float
from qdq.run import describe_environment

_LIMITS = "1.15 frozen, 1.35 learned, 1.55 distillation"  # docs/qat.md has the reasons
# Runs in an interpreter that may have neither qdq nor its version of torch.
_PEER = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import torch, torchvision
tool, batch_size, repeats, path = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.manual_seed(0)
images = torch.randn(batch_size, 3, 224, 224)
model = torchvision.models.resnet18().train()
if tool == "ModelOpt":
    import modelopt.torch.quantization as mtq
    quantized = mtq.quantize(torchvision.models.resnet18().train(), mtq.INT8_DEFAULT_CFG, lambda m: m(images))
else:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
    config = get_symmetric_quantization_config(is_per_channel=True, is_qat=True)
    exported = torch.export.export(torchvision.models.resnet18().train(), (images,)).module()
    quantized = prepare_qat_pt2e(exported, XNNPACKQuantizer().set_global(config))
pairs = [(m, torch.optim.SGD(m.parameters(), 1e-5, momentum=0.9), []) for m in (model, quantized)]
for _ in range(repeats + 1):
    for m, optimizer, seconds in pairs:
        began = time.process_time()
        optimizer.zero_grad()
        m(images).square().mean().backward()
        optimizer.step()
        seconds.append(time.process_time() - began)
json.dump([seconds[1:] for _, _, seconds in pairs], open(path, "w"))
"""


@dataclass
class Row:
    """The cost of a step.

    Args:
        name: The tool.
        float_seconds: Median of a float step.
        seconds: Median of a quantized one.
    """

    name: str
    float_seconds: float
    seconds: float

    @property
    def ratio(self) -> float:
        """Time of the quantized step divided by that of the float step."""
        return self.seconds / self.float_seconds


def bench_qat(
    *,
    batch_size: PositiveInt = 16,
    repeats: PositiveInt = 5,
    digits: bool = False,
    json: Path | None = None,
    modelopt_python: Path | None = None,
    torchao_python: Path | None = None,
) -> int:
    """Time training steps of ResNet-18 side by side; with `digits` also run the recipe of the digits.

    Args:
        batch_size: Images per step.
        repeats: Steps of each; the median is shown.
        digits: Also train the small networks of recipes/qat_digits.py, three seeds each (minutes).
        json: Also write the figures to this file.
        modelopt_python: Interpreter that has ModelOpt and torchvision.
        torchao_python: Interpreter that has torchao and torchvision.
    """
    rows = [
        _time_own(kind, batch_size, repeats)
        for kind in ("BatchNorm folded", "BatchNorm live", "LSQ")
    ]
    peers = {"ModelOpt": modelopt_python, "torchao": torchao_python}
    rows += [
        _time_peer(name, python, batch_size, repeats) for name, python in peers.items() if python
    ]
    rows += [
        _time_finetune(kind, batch_size, repeats)
        for kind in ("labels", "labels, LSQ", "distillation")
    ]
    print(f"{'ResNet-18, batch ' + str(batch_size):26}  float s  step s  ratio (limits: {_LIMITS})")
    for row in rows:
        print(f"{row.name:26}  {row.float_seconds:7.3f}  {row.seconds:6.3f}  {row.ratio:5.3f}")
    lines = (
        [line for network in ("resnet", "mobilenet") for line in _run_digits(network)]
        if digits
        else []
    )
    if json:
        write_json(json, {"rows": rows, "digits": lines, "environment": describe_environment()})
    return 0


def _time_own(kind: str, batch_size: int, repeats: int) -> Row:
    images = _draw_images(batch_size)
    plain, quantized = _make_pair(images, fold=kind != "BatchNorm live")
    if kind == "LSQ":
        for module in quantized.modules():
            if isinstance(module, qdq.TensorQuantizer):
                module.learn_range()
    steps = []
    for model in (plain, quantized):
        optimizer = torch.optim.SGD(model.train().parameters(), 1e-5, momentum=0.9)
        steps.append(
            partial(_step, model, optimizer, images, lambda outputs: outputs.square().mean())
        )
    return _time_pair(f"qdq, {kind}", steps[0], steps[1], repeats)


def _time_finetune(kind: str, batch_size: int, repeats: int) -> Row:
    images, labels = _draw_images(batch_size), torch.randint(0, 1000, (batch_size,))
    plain, quantized = _make_pair(images, fold=True)
    optimizer = torch.optim.Adam(plain.parameters(), 1e-5)
    float_step = partial(
        _step,
        plain,
        optimizer,
        images,
        lambda logits: F.cross_entropy(logits, labels),
        max_norm=1.0,
    )
    schedule = qdq.Schedule(steps=repeats + 1)
    if kind == "distillation":
        objective = Objective(quantized, copy_float(quantized), None, qdq.Distillation())
    else:
        objective = Objective(quantized, None, qdq.cross_entropy, None)
    trainer = Trainer(
        quantized, objective, schedule, repeats + 1, ranges="lsq" if "LSQ" in kind else "frozen"
    )
    return _time_pair(
        f"qdq.finetune, {kind}", float_step, partial(trainer.run_step, (images, labels)), repeats
    )


def _draw_images(batch_size: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(batch_size, 3, 224, 224)


def _make_pair(images: torch.Tensor, *, fold: bool) -> tuple[nn.Module, nn.Module]:
    """A float model and a quantized one."""
    from torchvision.models import resnet18

    plain, quantized = resnet18().eval(), resnet18().eval()
    if fold:
        for model in (plain, quantized):
            qdq.fold_batchnorm(model, images[:2])
    qdq.swap_modules(quantized, images[:2])
    qdq.rewire_operations(quantized, images[:2])
    qdq.calibrate_model(quantized, [images[:4]], method="max")
    return plain, quantized


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
    max_norm: float | None = None,
) -> None:
    optimizer.zero_grad()
    loss(model(images)).backward()  # type: ignore[no-untyped-call]
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()


def _time_pair(
    name: str, float_step: Callable[[], Any], step: Callable[[], Any], repeats: int
) -> Row:
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        began = time.process_time()
        float_step()
        between = time.process_time()
        step()
        seconds.append((between - began, time.process_time() - between))
    return Row(name, *map(statistics.median, zip(*seconds[1:], strict=True)))


def _time_peer(name: str, python: Path, batch_size: int, repeats: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seconds.json")
        subprocess.run(
            [str(python), "-c", _PEER, name, str(batch_size), str(repeats), str(path)],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        return Row(name, *map(statistics.median, json_module.loads(path.read_text())))


def _run_digits(network: str) -> list[str]:
    recipe = Path(__file__).parents[1] / "recipes" / "qat_digits.py"
    command = [sys.executable, str(recipe), "--network", network, "-q"]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    print(done.stdout, end="")
    return done.stdout.splitlines()


if __name__ == "__main__":
    run_command(bench_qat)
