"""The YAML file of `--compress`: a quantizer of training, when it starts, and the learning rates."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdq.distiller.files.config import QuantizerConfig, read_quantizers, read_sections
from qdq.distiller.files.quantizer_classes import POST_TRAINING
from qdq.distiller.training.learning_rates import LRScheduler, find_rates, read_lr_schedulers
from qdq.distiller.training.policies import Policy, read_policies
from qdq.errors import ArgumentError, DataError
from qdq.text import list_names, printable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressPlan:
    """What a file says.

    Args:
        quantizer: The quantizer; None: the network is trained in float.
        schedulers: Name -> scheduler of the learning rate.
        policies: When they act.
        label: Name of the file, for messages.
    """

    quantizer: QuantizerConfig | None
    schedulers: Mapping[str, LRScheduler]
    policies: tuple[Policy, ...]
    label: str

    def find_start(self, epochs: int) -> int:
        """The epoch before which the network becomes a quantized one; `epochs` without a quantizer.

        Args:
            epochs: Number of epochs of the training.

        Raises:
            ArgumentError: The policy of the quantizer does not reach to the last epoch, or does not begin before.
        """
        for policy in self.policies:
            if policy.kind != "quantizer":
                continue
            if policy.starting_epoch >= epochs or policy.ending_epoch < epochs:
                raise ArgumentError(
                    f"{self.label}: the quantizer acts from epoch {policy.starting_epoch} to {policy.ending_epoch}, "
                    f"of {epochs}; the last one must be among them.",
                    "correct starting_epoch, ending_epoch or the number of epochs (--epochs).",
                )
            return policy.starting_epoch
        return epochs

    def find_rates(self, lr: float, epochs: int) -> tuple[float, ...]:
        """As `learning_rates.find_rates`, for the schedulers of the file.

        Args:
            lr: The rate of the optimizer.
            epochs: Number of epochs.
        """
        acting = [policy for policy in self.policies if policy.kind == "lr_scheduler"]
        return find_rates(self.schedulers, acting, lr, epochs)


def read_compress_file(path: Path | str) -> CompressPlan:
    """Read the file of `--compress`.

    Args:
        path: The YAML file.

    Raises:
        ArgumentError: An unknown class, or a quantizer of another kind.
        ArgumentTypeError: An unknown argument.
        DataError: The file cannot be read, is of another kind, or its parts do not fit.
    """
    label = printable(path)
    sections = read_sections(path)
    quantizers = read_quantizers(sections, label)
    schedulers = read_lr_schedulers(sections["lr_schedulers"], label)
    instances: dict[str, Mapping[str, Any]] = {
        "quantizer": quantizers,
        "lr_scheduler": schedulers,
    }
    policies = read_policies(sections["policies"] or [], instances, label)
    _require_policies(instances, policies, label)
    return CompressPlan(_choose_quantizer(quantizers, policies, label), schedulers, policies, label)


def _require_policies(
    instances: Mapping[str, Mapping[str, Any]], policies: tuple[Policy, ...], label: str
) -> None:
    """Refuse instances without a policy: they would have no effect.

    Raises:
        DataError: The message names them.
    """
    named = {(policy.kind, policy.instance_name) for policy in policies}
    idle = []
    for kind, names in instances.items():
        idle += [name for name in names if (kind, name) not in named]
    if idle:
        raise DataError(
            f"{label}: no policy names {list_names(idle, 3)}, which would have no effect.",
            "add policies for them, or remove them.",
        )


def _choose_quantizer(
    quantizers: Mapping[str, QuantizerConfig], policies: tuple[Policy, ...], label: str
) -> QuantizerConfig | None:
    """The quantizer that a policy names.

    Raises:
        ArgumentError: It is one for after training.
        DataError: There are several policies of quantizers, or one leaves out epochs.
    """
    acting = [policy for policy in policies if policy.kind == "quantizer"]
    if not acting:
        return None
    if len(acting) > 1 or acting[0].frequency != 1:
        raise DataError(
            f"{label} has {len(acting)} policies of quantizers, the first with frequency {acting[0].frequency}; "
            "expected one, with frequency 1.",
            "a network is quantized once, and then in every step.",
        )
    config = quantizers[acting[0].instance_name]
    if config.class_name == POST_TRAINING:
        raise ArgumentError(
            f"{config.place}: {POST_TRAINING} quantizes after training.",
            "give the file to --qe-config-file, or name a quantizer of training.",
        )
    return config
