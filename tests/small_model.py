"""A small quantized model and batches for it: the same here and in the processes that tests start."""

import torch
from torch import nn

import qdq


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 16),
    )
    qdq.swap_modules(model.eval())
    return model


def make_batches(count):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 + i % 3, 3, 12, 12, generator=generator) * (1 + i) for i in range(count)]
