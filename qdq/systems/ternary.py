"""Ternary weights, alpha * {-1, 0, 1}: the projection, and the variables of ADMM that pull a float weight to it.

Leng, Li, Zhu, Jin: Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM, AAAI 2018, arXiv 1707.09870.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from qdq.qat.checkpoint import select_prefix
from qdq.systems.arithmetic import require_values
from qdq.systems.binary import SMALLEST_SCALE
from qdq.systems.grid import Grid, note_grid
from qdq.systems.selection import Selection
from qdq.systems.settings import require_number

_MOST_ITERATIONS = 20


def project_ternary(
    values: torch.Tensor,
    per_channel: bool = True,
    alpha: float | None = None,
    name: str = "project_ternary",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest alpha * {-1, 0, 1}^d, by turns of alpha and codes (arXiv 1707.09870, section 3.3).

    Repeated from alpha = mean |V| until no code changes: T_i = sign(V_i) where |V_i| > alpha / 2, else 0;
    alpha = <V, T> / <T, T>.

    Args:
        values: A weight.
        per_channel: One alpha for each output channel; False: one for all.
        alpha: A constant alpha instead.
        name: Name of the weight, for messages.

    Returns:
        alpha, `[C, 1, ...]` or of one element, and the codes; both in the type of the values. alpha is 0 for zeros.

    Raises:
        ArgumentError: As for `arithmetic.require_values`, or alpha is not above 0.
        NumberTypeError: Not a float tensor, or an alpha that is no number.
    """
    require_values(values, name)
    if alpha is not None:
        require_number(alpha, "alpha", name, SMALLEST_SCALE, math.inf)
    num_rows = values.shape[0] if per_channel and values.dim() else 1
    rows = values.detach().double().reshape(num_rows, -1)
    if alpha is not None:
        scale = torch.full_like(rows[:, :1], alpha)
        codes = _take_codes(rows, scale)
    else:
        scale, codes = _alternate(rows)
    shape = [-1] + [1] * (values.dim() - 1)
    return scale.reshape(shape).to(values.dtype), codes.reshape(values.shape).to(values.dtype)


def _alternate(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors `[C, 1]` and codes `[C, K]` of float64 rows."""
    codes = _take_codes(rows, rows.abs().mean(1, keepdim=True))
    for _ in range(_MOST_ITERATIONS):
        scale = (rows * codes).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True).clamp_min(
            1
        )
        former = codes
        codes = _take_codes(rows, scale)
        if torch.equal(codes, former):
            break
    return scale, codes


def _take_codes(rows: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.where(rows.abs() > scale / 2, rows.sign(), 0.0)


class TernarySplitting:
    """W, G and U of all ternary layers.

    Args:
        selection: The layers.
        per_channel: As for `train_ternary`.
        alpha: As for `train_ternary`.
    """

    def __init__(self, selection: Selection, per_channel: bool, alpha: float | None) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self._selection = selection
        self._per_channel = per_channel
        self._alpha = alpha
        self._scales: dict[str, torch.Tensor] = {}
        self._targets: dict[str, torch.Tensor] = {}
        self._duals: dict[str, torch.Tensor] = {}
        for name, layer in selection.layers.items():
            self.weights[name] = layer.weight
            self._duals[name] = torch.zeros_like(layer.weight)
        self._project()

    def _project(self) -> None:
        """G = P(W + U)."""
        for name, weight in self.weights.items():
            values = weight.detach() + self._duals[name]
            scale, codes = project_ternary(values, self._per_channel, self._alpha, name)
            self._scales[name] = scale
            self._targets[name] = scale * codes

    def penalty(self, rho: float) -> torch.Tensor:
        """The penalty rho / 2 * |W - G + U|^2.

        Args:
            rho: Its weight.
        """
        parts = []
        for name, weight in self.weights.items():
            distance = weight - self._targets[name] + self._duals[name]
            parts.append(distance.float().square().sum())
        return rho / 2 * torch.stack(parts).sum()

    def update(self) -> None:
        """G, then U."""
        self._project()
        for name, weight in self.weights.items():
            self._duals[name] += weight.detach() - self._targets[name]

    def scale_dual(self, factor: float) -> None:
        """Multiply U by a number, because rho is divided by it.

        Args:
            factor: The number.
        """
        for dual in self._duals.values():
            dual *= factor

    def measure(self) -> dict[str, float]:
        """|W - G| / |W| and the fraction of zeros."""
        differences = []
        norms = []
        zeros = 0
        for name, weight in self.weights.items():
            target = self._targets[name]
            differences.append((weight.detach() - target).double().norm())
            norms.append(weight.detach().double().norm())
            zeros += int((target == 0).sum())
        distance = float(torch.stack(differences).norm())
        norm = float(torch.stack(norms).norm())
        num_weights = sum(weight.numel() for weight in self.weights.values())
        return {
            "distance": distance / norm if norm else 0.0,
            "zeros": zeros / num_weights,
        }

    def pack(self) -> dict[str, torch.Tensor]:
        """alpha, G and U as tensors, from which `unpack` continues."""
        tensors = {}
        for name in self.weights:
            tensors[f"alpha//{name}"] = self._scales[name]
            tensors[f"G//{name}"] = self._targets[name]
            tensors[f"U//{name}"] = self._duals[name]
        return tensors

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Continue from `pack`; with nothing to continue from, keep the start."""
        if tensors:
            self._scales = select_prefix(tensors, "alpha//")
            self._targets = select_prefix(tensors, "G//")
            self._duals = select_prefix(tensors, "U//")

    def finish(self) -> None:
        """W = G."""
        for name, layer in self._selection.layers.items():
            with torch.no_grad():
                layer.weight.copy_(self._targets[name])
            scale = self._scales[name].float().flatten().clamp_min(SMALLEST_SCALE)
            note_grid(layer, "weight", Grid("ternary", scale, torch.zeros_like(scale), -1, 1))
