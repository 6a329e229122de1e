"""The file between two rounds of training: the model, tensors of the system and the log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdq.distributed import broadcast_number, find_rank, read_together
from qdq.errors import ArgumentError
from qdq.files import guard_files
from qdq.qat.checkpoint import load_tensors, save_tensors, select_prefix

FILE = "rounds.safetensors"
_FORMAT = "qdq training rounds 1"
_MODEL_PREFIX = "model//"
_SYSTEM_PREFIX = "system//"

Row = dict[str, float]
"""What is logged about a round."""


class RoundFile:
    """The file of a run; with several processes, only the first writes it.

    Args:
        folder: Its folder.
        settings: Everything that the run depends on; the file of a run with other settings is refused.

    Raises:
        ArgumentError: The folder cannot be written to.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._path = folder / FILE
        self._settings = settings
        guard_files(outputs=[self._path])

    def write(self, model: nn.Module, tensors: Mapping[str, torch.Tensor], rows: list[Row]) -> None:
        """Replace the file.

        Args:
            model: The model after a round.
            tensors: Of the system, by name.
            rows: The log.
        """
        if find_rank()[0] != 0:
            return
        state = {}
        for name, tensor in model.state_dict().items():
            state[f"{_MODEL_PREFIX}{name}"] = tensor
        for name, tensor in tensors.items():
            state[f"{_SYSTEM_PREFIX}{name}"] = tensor
        facts = {"format": _FORMAT, "settings": self._settings, "rows": rows}
        save_tensors(self._path, state, facts)

    def read(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], list[Row]]:
        """Give the model the state in the file.

        Args:
            model: The float model, as the run began with it.

        Returns:
            The tensors of the system and the log; both empty if there is no file.

        Raises:
            ArgumentError: The run had other settings.
            DataError: The file is damaged.
        """
        if not broadcast_number(self._path.is_file()):
            return {}, []
        tensors, facts = load_tensors(self._path, _FORMAT, read_together)
        self._require_same(facts["settings"])
        model.load_state_dict(select_prefix(tensors, _MODEL_PREFIX))
        return select_prefix(tensors, _SYSTEM_PREFIX), facts["rows"]

    def _require_same(self, settings: dict[str, Any]) -> None:
        changed = []
        for name in self._settings | settings:
            if self._settings.get(name) != settings.get(name):
                changed.append(name)
        if changed:
            raise ArgumentError(
                f"{self._path} is of a run with other settings: {', '.join(changed)}.",
                "choose another folder, or remove it to start again.",
            )
