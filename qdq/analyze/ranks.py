"""Work shared by the processes that torchrun started; one process alone needs nothing of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

Item = TypeVar("Item")


class Ranks:
    """The processes of this run; as a with-block it starts their connection (gloo) if there is none, and ends it."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._is_owner = False

    def __enter__(self) -> Ranks:
        is_started = dist.is_available() and dist.is_initialized()
        if not is_started and int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
            dist.init_process_group("gloo")
            self._is_owner = is_started = True
        if is_started:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        return self

    def __exit__(self, *error: object) -> None:
        if self._is_owner:
            dist.destroy_process_group()

    def share(self, items: Sequence[Item]) -> list[Item]:
        """The items that this process does."""
        return list(items[self.rank :: self.size])

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def merge(
        self, names: Sequence[Item], found: Mapping[Item, npt.NDArray[np.float64]]
    ) -> dict[Item, npt.NDArray[np.float64]]:
        """What all processes have found, in each of them.

        Args:
            names: Everything that was shared out.
            found: The part of this process; all arrays have one shape.
        """
        if self.size == 1 or not names:
            return dict(found)
        shapes = torch.zeros(3, dtype=torch.int64)  # dimensions and size: a process may have found nothing
        example = next(iter(found.values()), None)
        if example is not None:
            shapes[: example.ndim + 1] = torch.tensor([example.ndim, *example.shape])
        dist.all_reduce(shapes, dist.ReduceOp.MAX)
        shape = shapes[1 : 1 + int(shapes[0])].tolist()
        total = torch.zeros(len(names), *shape, dtype=torch.float64)
        for place, name in enumerate(names):
            if name in found:
                total[place] = torch.from_numpy(np.asarray(found[name]))
        dist.all_reduce(total)
        return {name: total[place].numpy() for place, name in enumerate(names)}
