"""The networks of `verify_fp8.py` and `bench_formats.py`: their full size, and fixed seeds."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qdq
from qdq.workloads.workload import Workload

_RECIPES = Path(__file__).parents[1] / "recipes" / "models"
_SENTENCES = _RECIPES / "sentences.py"
_images = partial(qdq.WorkloadOptions, batch_size=8, calib_batches=4, eval_samples=16)

NETWORKS = {
    "resnet50": _images("resnet50", weights="random"),
    "efficientnet_lite0": _images("efficientnet_lite0"),
    "vit_b_16": _images("vit_b_16", weights="random"),
    "swin_t": _images("swin_t", weights="random"),
    "deit_tiny": _images("timm/deit_tiny_patch16_224", weights="random"),
    "minilm": qdq.WorkloadOptions(
        f"{_SENTENCES}:build",
        data=f"{__file__}:list_sentences",
        mask="attention_mask",
        calib_batches=12,
        eval_samples=48,
    ),
}
"""Images have 224 pixels, sentences 32 tokens."""


def list_sentences() -> list[Any]:
    """12 batches to calibrate on, then those of the score."""
    sys.path.insert(0, str(_RECIPES))
    sentences: Any = importlib.import_module("sentences")
    sentences.LENGTH = 32  # the fewest tokens whose attention TensorRT-RTX 1.7 fuses
    return [*sentences.batches(), *sentences.score_batches()]


def load_network(name: str) -> Workload:
    """A network with its data. Random weights get BatchNorm statistics of the data, and a head that is not zero.

    Args:
        name: A key of `NETWORKS`.

    Raises:
        ArgumentError: No network has this name.
    """
    if name not in NETWORKS:
        raise qdq.ArgumentError(f"no network is named {name}.", f"known are {', '.join(NETWORKS)}.")
    options = NETWORKS[name]
    workload = qdq.load_workload(options)
    if options.weights == "random":
        torch.manual_seed(0)
        _fill_heads(workload.module)
        _warm(workload)
    return workload


def _fill_heads(model: nn.Module) -> None:
    """Draw weights that are all 0: torchvision starts the classifier of a ViT so, and its outputs would be 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)


@torch.no_grad()
def _warm(workload: Workload) -> None:
    """Give BatchNorm the statistics of the data; else the outputs of random weights hardly depend on the input."""
    norms = [module for module in workload.module.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    workload.module.train()
    for batch in workload.calibration:
        workload.module(batch[0])
    workload.module.eval()
