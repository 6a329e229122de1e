"""A block like those of MobileNetV2, in which the rounding of one channel counts most."""

import torch
from torch import nn


class Inverted(nn.Module):
    """Expand, depthwise, project, with ReLU6 between; channel 3 of the depthwise convolution is the loudest."""

    def __init__(self, channels, loudness=8.0):
        super().__init__()
        self.expand = nn.Conv2d(3, channels, 1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.project = nn.Conv2d(channels, 6, 1)
        self.relu = nn.ReLU6()
        with torch.no_grad():
            self.expand.weight.mul_(2)
            self.expand.bias.add_(3.0)
            self.depthwise.bias.add_(3.0)
            self.depthwise.weight[3] *= loudness
            self.depthwise.weight[3] -= self.depthwise.weight[3].mean()

    def forward(self, x):
        return self.project(self.relu(self.depthwise(self.relu(self.expand(x)))))
