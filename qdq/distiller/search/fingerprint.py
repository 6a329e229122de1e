"""Fingerprints of searches, so that a journal is not used for another model, other data or other settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from qdq.calibrate.collect import bytes_of
from qdq.distiller.post_training.quantizer import PostTrainLinearQuantizer


def fingerprint_search(quantizer: PostTrainLinearQuantizer, facts: Iterable[Any]) -> str:
    """A hash of a quantizer and of facts about a search, 16 hexadecimal digits.

    Args:
        quantizer: The quantizer: its settings, statistics and model.
        facts: Values that print the same in every process.
    """
    settings = [
        quantizer.defaults,
        quantizer.overrides,
        quantizer.weight_options,
        quantizer.model_activation_stats,
    ]
    digest = hashlib.sha256(f"{torch.__version__} {settings} {list(facts)}".encode())
    for name, tensor in quantizer.model.state_dict().items():
        digest.update(name.encode())
        _feed(digest, tensor)
    return digest.hexdigest()[:16]


def digest_batches(batches: Iterable[Any], name: str = "") -> str:
    """A hash of batches, 16 hexadecimal digits.

    Args:
        batches: Tensors and other values in lists, tuples and dictionaries.
        name: What is done with them.
    """
    digest = hashlib.sha256(name.encode())
    for batch in batches:
        for leaf in tree_leaves(batch):
            if isinstance(leaf, torch.Tensor):
                _feed(digest, leaf)
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]


def _feed(digest: Any, tensor: torch.Tensor) -> None:
    """Add the type, shape and values of a tensor."""
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if tensor.numel():
        digest.update(bytes_of(tensor))
