"""`LayerSettings`: how one layer is quantized, and the checks of the values that users write for it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from qdq.distiller.ranges.clipping import ClipMode
from qdq.distiller.ranges.modes import LinearQuantMode, ModePair
from qdq.distiller.settings.input_settings import InputSettings, read_inputs, require_n_stds
from qdq.distiller.settings.values import read_value
from qdq.errors import ArgumentError, ArgumentTypeError
from qdq.schema import describe

logger = logging.getLogger(__name__)

_FORMER_KEYS = {
    "acts": "bits_activations",
    "wts": "bits_weights",
    "bias": "bits_bias",
    "input_quantization_settings": "input_overrides",
}
_FORMER_FP16 = "fp16"


@dataclass(frozen=True)
class LayerSettings:
    """How a layer is quantized.

    Args:
        bits_activations: Bits of its output; None: float.
        bits_weights: Bits of its weight; None: float, or there is no weight.
        bits_bias: Likewise of its bias.
        mode: The modes of its output and its weight.
        per_channel_wts: Whether every output channel of the weight has its own scale.
        clip_acts: How the range of its output is cut.
        clip_n_stds: The number of standard deviations of N_STD.
        clip_half_range: Whether a ReLU follows, so that only the positive half of a distribution counts.
        scale_approx_mult_bits: Bits of the multiplier of an approximated scale; None: exact scales.
        inputs_quant_auto_fallback: Whether an input that comes as a plain tensor is quantized as the output.
        fpq_module: 16, 32 or 64: the layer runs in this float type; None: it does not.
        fake: Whether the layer computes in float and its output is rounded; None: the rule of its kind.
        make_identity: Whether the layer becomes an identity, as its work is done elsewhere.
        quantize_inputs: Whether a layer that computes in float quantizes its inputs, too.
        input_overrides: The settings of single inputs, by position.
    """

    bits_activations: int | None = 8
    bits_weights: int | None = 8
    bits_bias: int | None = 32
    mode: ModePair = ModePair(LinearQuantMode.SYMMETRIC, LinearQuantMode.SYMMETRIC)  # noqa: RUF009  # frozen
    per_channel_wts: bool = False
    clip_acts: ClipMode = ClipMode.NONE
    clip_n_stds: float | None = None
    clip_half_range: bool = False
    scale_approx_mult_bits: int | None = None
    inputs_quant_auto_fallback: bool = True
    fpq_module: int | None = None
    fake: bool | None = None
    make_identity: bool = False
    quantize_inputs: bool = False
    input_overrides: Mapping[int, InputSettings] = field(default_factory=dict)


LAYER_KEYS = tuple(setting.name for setting in fields(LayerSettings))
"""The keys that an override may have."""


def update_settings(
    settings: LayerSettings,
    values: Mapping[str, Any],
    place: str,
    allowed: Collection[str] = LAYER_KEYS,
) -> LayerSettings:
    """Settings with some values replaced, as users write them: names of modes, 0 bits for float.

    Args:
        settings: The settings of all that is not named.
        values: Key -> value.
        place: Where the values stand, for messages: "override 'conv1'".
        allowed: The keys that are allowed.

    Raises:
        ArgumentTypeError: An unknown key, or a mode of another type.
        ArgumentError: An invalid value, a former key, `fp16` together with `fpq_module`, or N_STD without a number.
    """
    values = _replace_fp16(values, place)
    _require_known(values, place, [key for key in LAYER_KEYS if key in allowed])
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key != "input_overrides":
            changes[key] = read_value(key, value, place)
    settings = replace(settings, **changes)
    as_output = InputSettings(
        settings.bits_activations,
        settings.mode.activations,
        settings.clip_acts,
        settings.clip_n_stds,
    )
    require_n_stds(as_output, place)
    if "input_overrides" in values:
        inputs = read_inputs(values["input_overrides"], as_output, place)
        settings = replace(settings, input_overrides=inputs)
    return settings


def _replace_fp16(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The values with `fpq_module: 16` for the former `fp16: true`."""
    replaced = dict(values)
    if _FORMER_FP16 not in replaced:
        return replaced
    is_half = read_value(_FORMER_FP16, replaced.pop(_FORMER_FP16), place)
    if not is_half:
        return replaced
    if replaced.get("fpq_module") is not None:
        raise ArgumentError(
            f"{place}: fp16 and fpq_module are both set.",
            "keep fpq_module; fp16 is its former form.",
        )
    logger.warning("%s: fp16 is deprecated; write fpq_module: 16", place)
    return replaced | {"fpq_module": 16}


def _require_known(values: Mapping[str, Any], place: str, allowed: list[str]) -> None:
    for key in values:
        if key in _FORMER_KEYS:
            raise ArgumentError(
                f"{place}: {key} is the former name of {_FORMER_KEYS[key]}.", "write the new name."
            )
        if key not in allowed:
            raise ArgumentTypeError(
                f"{place}: {describe(key)} is unknown; expected {', '.join(allowed)}.",
                "correct or remove it.",
            )
