"""The metric of models that compute embeddings: how similar they are to those of the float model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from qdq.batch import split_inputs
from qdq.forward import call_model, evaluating
from qdq.metrics import Outputs, name_arrays
from qdq.outputs import name_outputs
from qdq.predictor import Predict, make_predictor

_METRIC = "cosine"


class EmbeddingSimilarity:
    """The mean cosine between the embeddings of a model and those of the float model, on the same samples.

    An output `[N, T, D]` is averaged over its T positions, those of padding left out; the result is `[N, D]`.

    Args:
        module: The float model, which runs here, once.
        batches: The samples.
        output: Name of the output that holds the embeddings.
        mask: Name of the input that is 0 at padding; None if there is none.

    Attributes:
        has_embedding: Whether the model has such an output.
    """

    def __init__(
        self, module: nn.Module, batches: Iterable[Any], output: str, mask: str | None
    ) -> None:
        self._batches = list(batches)
        self._output = output
        self._mask = mask
        predict = make_predictor(module)
        with evaluating(module):
            named = name_outputs(call_model(module, self._batches[0]))
        self.has_embedding = output in named
        self._expected: list[np.ndarray[Any, Any]] = []
        if self.has_embedding:
            self._expected = [self._embed(predict, batch) for batch in self._batches]

    def __call__(self, predict: Predict) -> dict[str, float]:
        """The mean cosine, by its name.

        Args:
            predict: A function inputs -> outputs.
        """
        cosines = []
        for batch, expected in zip(self._batches, self._expected, strict=True):
            actual = self._embed(predict, batch)
            cosines.append(np.sum(actual * expected, axis=1))
        return {_METRIC: float(np.concatenate(cosines).mean())}

    def _embed(self, predict: Predict, batch: Any) -> np.ndarray[Any, Any]:
        """The embeddings of a batch with length 1, float64 `[N, D]`."""
        values = self._select(predict(batch)).astype(np.float64)
        if values.ndim == 3:
            values = self._average(values, batch)
        norms = np.linalg.norm(values, axis=1, keepdims=True)
        normalized: np.ndarray[Any, Any] = values / np.maximum(norms, np.finfo(np.float64).tiny)
        return normalized

    def _select(self, outputs: Outputs) -> np.ndarray[Any, Any]:
        named = name_arrays(outputs)
        array = named[self._output] if len(named) > 1 else next(iter(named.values()))
        values: np.ndarray[Any, Any] = np.asarray(array)
        return values

    def _average(self, values: np.ndarray[Any, Any], batch: Any) -> np.ndarray[Any, Any]:
        """The mean over all positions that are not padding."""
        weights = np.ones(values.shape[:2])
        if self._mask is not None:
            _, named = split_inputs(batch)
            weights = torch.as_tensor(named[self._mask]).cpu().double().numpy()
        total: np.ndarray[Any, Any] = np.einsum("ntd,nt->nd", values, weights)
        average: np.ndarray[Any, Any] = total / weights.sum(axis=1, keepdims=True)
        return average
