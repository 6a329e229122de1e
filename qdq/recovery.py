"""The state of `recover_accuracy` in a file, from which a run that was killed continues."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from qdq.batch import tensors_of
from qdq.calibrate.collect import bytes_of
from qdq.corrections import AccuracyPass, Snapshot, list_passes
from qdq.files import write_atomic
from qdq.judge import Judge, JudgedStep
from qdq.quantizer import named_quantizers
from qdq.schema import digest_parts

logger = logging.getLogger(__name__)

_METADATA_KEY = "qdq recovery 2"


class Recovery:
    """The passes that are done, and the model after the last of them.

    Args:
        path: The file; None keeps nothing.
        key: A digest of everything that the passes depend on, see `digest_recovery`. A file with another key is not
            used, and is replaced.

    Attributes:
        tried: Names of the passes that are done, those that were undone or left out included.
        done: Names of those that stay.
        notes: What was left out and why, and what the last fit did.
        is_fitted: Whether the last fit was tried.
        is_refitted: Whether the passes of the model are fitted to its samples; not if it failed.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path = path
        self._key = key
        self.tried: list[str] = []
        self.done: list[str] = []
        self.notes: list[str] = []
        self.is_fitted = False
        self.is_refitted = False

    def resume(
        self,
        model: nn.Module,
        judge: Judge,
        passes: Mapping[str, AccuracyPass],
        refit: Sequence[Any] | None,
    ) -> None:
        """Give the model and the judge the state of the file; without a file of this key they do not change.

        Args:
            model: The model in the state that `digest_recovery` got.
            judge: Likewise.
            passes: Name -> the pass of this call.
            refit: The samples of the last fit.
        """
        facts, tensors = self._read()
        if not facts:
            return
        self.tried = facts["tried"]
        self.notes = facts["notes"]
        self.is_fitted = facts["is_fitted"]
        self.is_refitted = facts["is_refitted"]
        self.done = facts["done"]
        options = {entry.name: entry for entry in list_passes(model)}
        options |= {name: passes[name] for name in self.done}
        recorded = []
        for name in facts["passes"]:
            run = options[name].run
            if self.is_refitted:
                run = partial(run, batches=refit)
            recorded.append(AccuracyPass(name, run))
        Snapshot.from_tensors(model, tensors, recorded).restore(model)
        judge.resume([JudgedStep(**step) for step in facts["steps"]])
        logger.info("continues after %s, from %s", ", ".join(self.tried), self._path)

    def save(self, model: nn.Module, judge: Judge) -> None:
        """Write the state after a pass.

        Raises:
            ArgumentError: The file cannot be written.
        """
        if self._path is None:
            return
        present = list_passes(model)
        facts = {
            "key": self._key,
            "tried": self.tried,
            "notes": self.notes,
            "is_fitted": self.is_fitted,
            "is_refitted": self.is_refitted,
            "passes": [entry.name for entry in present],
            "done": self.done,
            "steps": [asdict(step) for step in judge.steps],
        }
        tensors = Snapshot(model).name_tensors(model)
        write_atomic(self._path, save(tensors, {_METADATA_KEY: json.dumps(facts)}))

    def _read(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Facts and tensors of the file; nothing if it cannot be read or has another key."""
        if self._path is None:
            return {}, {}
        try:
            with safe_open(self._path, "pt") as file:
                facts = json.loads((file.metadata() or {}).get(_METADATA_KEY, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        except (OSError, SafetensorError, ValueError):
            return {}, {}
        if facts.get("key") != self._key:
            return {}, {}
        return facts, tensors


def digest_recovery(
    model: nn.Module,
    judge: Judge,
    passes: Sequence[str],
    batches: Sequence[Any],
    refit: Sequence[Any] | None,
    view: str,
) -> str:
    """A digest of everything that the result of `recover_accuracy` depends on.

    Args:
        model: The model before the passes.
        judge: What it has measured before.
        passes: The passes to try.
        batches: The samples to fit.
        refit: The samples of the last fit.
        view: Which outputs count, in words.
    """
    quantizers = [f"{name} {quantizer.extra_repr()}" for name, quantizer in named_quantizers(model)]
    facts = {
        "torch": torch.__version__,
        "passes": list(passes),
        "present": [entry.name for entry in list_passes(model)],
        "quantizers": quantizers,
        "steps": [asdict(step) for step in judge.steps],
        "view": view,
    }
    parts = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            parts[f"{name} {tensor.dtype} {tuple(tensor.shape)}"] = tensor
    for role, samples in (("batches", batches), ("refit", refit or ())):
        for number, tensor in enumerate(tensors_of(list(samples))):
            parts[f"{role} {number} {tensor.dtype} {tuple(tensor.shape)}"] = tensor
    return digest_parts(facts, {name: bytes_of(tensor) for name, tensor in parts.items()})
