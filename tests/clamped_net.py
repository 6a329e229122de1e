"""A network with a clamp that `center_inputs` can move, as the text of a file for a recipe."""

CLAMPED = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
    first.weight.data.mul_(4)
    last = [nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4)]
    return nn.Sequential(first, nn.ReLU6(), second, *last).eval()

def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)]
"""
