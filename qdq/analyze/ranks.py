"""Work shared by the processes that torchrun started; a single process exchanges nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from qdq.distributed import find_rank, gather_bytes, joining_processes

Item = TypeVar("Item")
Results = Mapping[Item, npt.NDArray[np.float64]]


class Ranks:
    """The processes of this run.

    As a with-block it starts the connection between them (gloo) if there is none, and ends it.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._exits = ExitStack()

    def __enter__(self) -> Ranks:
        self._exits.enter_context(joining_processes(torch.device("cpu")))
        self.rank, self.size = find_rank()
        return self

    def __exit__(self, *error: object) -> None:
        self._exits.close()

    def share(self, items: Sequence[Item]) -> list[Item]:
        """The items that this process works on."""
        return list(items[self.rank :: self.size])

    def unite(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The contents of all processes together, the same in each process.

        Args:
            content: The part of this process; it must be JSON.
        """
        united: dict[str, Any] = {}
        for text in gather_bytes(json.dumps(content).encode()):
            united |= json.loads(text)
        return united

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        return any(gather_bytes(b"set" if flag else b""))

    def merge(
        self, names: Sequence[Item], results: Results[Item]
    ) -> dict[Item, npt.NDArray[np.float64]]:
        """The results of all processes, in each process.

        Args:
            names: Everything that was distributed, in the same order in all processes.
            results: The results of this process.
        """
        if self.size == 1 or not names:
            return dict(results)
        merged: dict[Item, npt.NDArray[np.float64]] = {}
        for content in gather_bytes(_pack(names, results)):
            merged |= _unpack(names, content)
        return merged


def _pack(names: Sequence[Item], results: Results[Item]) -> bytes:
    """Results as bytes; each name is stored as its position in `names`."""
    positions: list[int] = []
    arrays: list[npt.NDArray[np.float64]] = []
    for position, name in enumerate(names):
        if name in results:
            positions.append(position)
            arrays.append(results[name])
    buffer = io.BytesIO()
    np.savez(buffer, np.array(positions, np.int64), *arrays)
    return buffer.getvalue()


def _unpack(names: Sequence[Item], content: bytes) -> dict[Item, npt.NDArray[np.float64]]:
    """The results in bytes that `_pack` made with the same `names`."""
    archive = np.load(io.BytesIO(content), allow_pickle=False)
    positions, *arrays = [archive[key] for key in archive.files]
    return {names[position]: array for position, array in zip(positions, arrays, strict=True)}
