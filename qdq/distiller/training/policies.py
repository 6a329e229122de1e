"""When a file quantizes and changes the learning rate: its section `policies`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdq.distiller.settings.values import describe_value, is_whole
from qdq.errors import DataError

_EPOCHS = ("starting_epoch", "ending_epoch", "frequency")
_FIX = "see docs/distiller.md for the form of the file."


@dataclass(frozen=True)
class Policy:
    """In which epochs an instance acts: starting_epoch, + frequency, ..., before ending_epoch.

    Args:
        kind: "quantizer" or "lr_scheduler".
        instance_name: Its name in the file.
        starting_epoch: From 0 on.
        ending_epoch: Above it.
        frequency: 1 or more.
    """

    kind: str
    instance_name: str
    starting_epoch: int
    ending_epoch: int
    frequency: int

    def acts_in(self, epoch: int) -> bool:
        """Whether it acts in an epoch.

        Args:
            epoch: From 0 on.
        """
        return epoch in range(self.starting_epoch, self.ending_epoch, self.frequency)


def read_policies(
    section: Any, instances: Mapping[str, Mapping[str, Any]], label: str
) -> tuple[Policy, ...]:
    """The policies of a file.

    Args:
        section: Content of the section `policies`.
        instances: Kind -> name -> instance, which policies can name.
        label: Name of the file, for messages.

    Raises:
        DataError: Another form, an unknown name, or epochs that are none.
    """
    if not isinstance(section, list | tuple):
        raise DataError(f"{label}: policies is {describe_value(section)}; expected a list.", _FIX)
    policies = []
    for number, entry in enumerate(section):
        policies.append(_read_policy(entry, instances, f"{label}: policies[{number}]"))
    return tuple(policies)


def _read_policy(entry: Any, instances: Mapping[str, Mapping[str, Any]], place: str) -> Policy:
    if not isinstance(entry, Mapping):
        raise DataError(f"{place} is {describe_value(entry)}; expected a mapping.", _FIX)
    unknown = [key for key in entry if key not in (*instances, *_EPOCHS)]
    kinds = [key for key in entry if key in instances]
    if unknown or len(kinds) != 1:
        raise DataError(
            f"{place} has the keys {', '.join(map(str, entry))}; expected one of {', '.join(instances)}, and "
            f"{', '.join(_EPOCHS)}.",
            "qdq quantizes, and does not prune: leave other policies out.",
        )
    kind = kinds[0]
    name = entry[kind].get("instance_name") if isinstance(entry[kind], Mapping) else None
    if not isinstance(name, str) or name not in instances[kind]:
        names = ", ".join(map(str, instances[kind])) or "none"
        raise DataError(
            f"{place}: instance_name is {describe_value(name)}; the file has {names}.",
            "name one of them.",
        )
    return Policy(kind, name, *_read_epochs(entry, place))


def _read_epochs(entry: Mapping[str, Any], place: str) -> tuple[int, int, int]:
    """First epoch, end, and distance.

    Raises:
        DataError: They are no epochs.
    """
    numbers: list[Any] = [entry.get(key) for key in _EPOCHS]
    if all(is_whole(number) for number in numbers):
        start, end, frequency = numbers
        if 0 <= start < end and frequency >= 1:
            return start, end, frequency
    written = ", ".join(
        f"{key} {describe_value(number)}" for key, number in zip(_EPOCHS, numbers, strict=True)
    )
    raise DataError(
        f"{place} has {written}; expected whole numbers, 0 <= starting_epoch < ending_epoch, frequency >= 1.",
        "correct them.",
    )
