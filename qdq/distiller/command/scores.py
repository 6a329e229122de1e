"""Loss and accuracy of a classifier as running means over samples, which a GPU computes without a wait a batch."""

from __future__ import annotations

import torch
from torch import nn

from qdq.device import read_numbers


class Scores:
    """Means over all samples so far: each sample counts once, also in a smaller last batch."""

    def __init__(self) -> None:
        self.num_samples = 0
        self._sums: torch.Tensor | None = None  # float64 [3]: loss, hits, hits among five

    @torch.no_grad()
    def add(self, outputs: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch.

        Args:
            outputs: `[B, classes]`.
            labels: Class of each sample, int64 `[B]`.
        """
        labels = labels.to(outputs.device)
        loss = nn.functional.cross_entropy(outputs.float(), labels, reduction="sum")
        best = outputs.topk(min(5, outputs.shape[1])).indices == labels[:, None]
        sums = torch.stack([loss.double(), best[:, 0].sum().double(), best.sum().double()])
        self._sums = sums if self._sums is None else self._sums + sums
        self.num_samples += len(labels)

    def read(self) -> dict[str, float]:
        """Loss, Top1 and Top5; the latter two in per cent. Waits for the device."""
        if self._sums is None:
            return {}
        loss, top1, top5 = read_numbers(list(self._sums / self.num_samples))
        return {"Loss": loss, "Top1": 100 * top1, "Top5": 100 * top5}
