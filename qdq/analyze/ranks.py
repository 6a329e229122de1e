"""Work shared by the processes that torchrun started; one process alone needs nothing of it."""

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


class Ranks:
    """The processes of this run; as a with-block it starts their connection (gloo) if there is none, and ends it."""

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
        """The items that this process does."""
        return list(items[self.rank :: self.size])

    def unite(self, known: Mapping[str, Any]) -> dict[str, Any]:
        """What any process knows, the same in each of them; JSON."""
        united: dict[str, Any] = {}
        for content in gather_bytes(json.dumps(known).encode()):
            united |= json.loads(content)
        return united

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        return any(gather_bytes(b"set" if flag else b""))

    def merge(
        self, names: Sequence[Item], found: Mapping[Item, npt.NDArray[np.float64]]
    ) -> dict[Item, npt.NDArray[np.float64]]:
        """What all processes have found, in each of them.

        Args:
            names: Everything that was shared out.
            found: The part of this process.
        """
        if self.size == 1 or not names:
            return dict(found)
        own, places = io.BytesIO(), [place for place, name in enumerate(names) if name in found]
        np.savez(own, np.array(places, np.int64), *(found[names[place]] for place in places))
        merged: dict[Item, npt.NDArray[np.float64]] = {}
        for content in gather_bytes(own.getvalue()):
            part = np.load(io.BytesIO(content), allow_pickle=False)
            where, *arrays = (part[key] for key in part.files)
            merged |= {names[place]: array for place, array in zip(where, arrays, strict=True)}
        return merged
