"""The GPUs that a recipe quantizes for: what --target, --sm and the device say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdq.cli.refusals import check_formats, choose_target_sm
from qdq.errors import ArgumentError
from qdq.roofline import GPUS, find_gpu
from qdq.trt.backend import Backend, find_backend

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Target:
    """A GPU that a recipe quantizes for.

    Args:
        name: As for --target; "" if none was given.
        sm: Its compute capability, 89 for 8.9.
        backend: The TensorRT to build with. TensorRT-RTX builds for another compute capability if it does not have that
            of the target.
        gpu: The GPU that times are predicted for; None if none are.
    """

    name: str
    sm: int
    backend: Backend
    gpu: str | None = None


def choose_targets(
    names: Sequence[str],
    *,
    sm: int | None,
    device: torch.device,
    formats: Sequence[str],
    method: str,
    gpu: str | None = None,
    has_profile: bool = False,
) -> tuple[Target, ...]:
    """The targets of a run, refused if one of them cannot be had; one if none is named.

    Args:
        names: As for --target.
        sm: As for --sm.
        device: The device that the model runs on; its GPU is the target by default.
        formats: As for `swap_modules`.
        method: As for `calibrate_model`.
        gpu: As for --gpu. By default a named target, if the rates of its GPU are known.
        has_profile: Whether layers are ranked by the times of an engine.

    Raises:
        ArgumentError: An unknown target, one that is named twice, options that are for one target beside several, an
            unknown GPU, or as for `choose_target_sm` and `check_formats`.
        DependencyError: No TensorRT can build here.
    """
    if len(names) > 1:
        _require_options_of_several(names, sm, gpu, has_profile)
    if gpu is not None:
        find_gpu(gpu)  # refuses an unknown one
    targets = []
    for name in names or ("",):
        target = _find_target(name, sm, device)
        check_formats(formats, target.sm, method)
        timed_gpu = name if gpu is None and name in GPUS else gpu
        targets.append(Target(target.name, target.sm, target.backend, timed_gpu))
    return tuple(targets)


def _require_options_of_several(
    names: Sequence[str], sm: int | None, gpu: str | None, has_profile: bool
) -> None:
    """Refuse options that are for one target.

    Raises:
        ArgumentError: With the option.
    """
    for name in names:
        if names.count(name) > 1:
            raise ArgumentError(f"--target names {name} twice.", "name each target once.")
    given = {"--sm": sm is not None, "--gpu": gpu is not None, "--profile": has_profile}
    for option, is_given in given.items():
        if is_given:
            raise ArgumentError(
                f"--target names {len(names)} GPUs, and {option} is for one.",
                f"leave {option} out, or run qdq ptq for each target.",
            )


def _find_target(name: str, sm: int | None, device: torch.device) -> Target:
    """One target, by its name or by the options in its place."""
    from qdq.device import find_sm  # with torch, which --help does not need

    target_sm = choose_target_sm(name or None, sm)
    gpu_sm = find_sm(device) if target_sm is None else target_sm
    backend = find_backend("auto", sm, gpu_sm=gpu_sm)
    return Target(name, backend.sm if target_sm is None else target_sm, backend)
