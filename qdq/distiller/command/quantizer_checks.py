"""Settings of the quantizer that contradict each other or have no effect: refused or logged before any work."""

from __future__ import annotations

from qdq.distiller.command.option_flags import flag_of, list_changed, list_flags, log_ignored
from qdq.distiller.command.quantize_options import QuantizeOptions, SearchOptions
from qdq.errors import ArgumentError

SOURCES = ("qe_stats_file", "qe_dynamic", "qe_calibration", "qe_config_file")
"""Where ranges come from; one of them at most."""

# They say what to do, not how the quantizer is made.
_ACTIONS = ("quantize_eval", "qe_convert_pytorch", "qe_pytorch_backend", *SOURCES)

_REPLACED = {
    "qe_convert_pytorch": "the model of the search is evaluated, not the int8 modules of torch",
    "qe_dynamic": "the search needs constant ranges",
}
"""Options that a search does not go with, and why."""


def check_sources(quantize: QuantizeOptions) -> None:
    """Refuse two sources of ranges.

    Args:
        quantize: The options of the quantizer.

    Raises:
        ArgumentError: There are two.
    """
    sources = [name for name in list_changed(quantize) if name in SOURCES]
    if len(sources) > 1:
        raise ArgumentError(
            f"{list_flags(sources)} are given; expected one of {list_flags(SOURCES)}.",
            "choose one.",
        )


def check_quantizer(quantize: QuantizeOptions) -> None:
    """Refuse settings of the quantizer that contradict each other, and log those without an effect.

    Args:
        quantize: The settings.

    Raises:
        ArgumentError: They do.
    """
    if quantize.qe_config_file is not None:
        ignored = [name for name in list_changed(quantize) if name not in _ACTIONS]
        log_ignored(ignored, f"the settings are those of {quantize.qe_config_file}")
        return
    if quantize.qe_clip_acts == "n_std" and quantize.qe_clip_n_stds is None:
        raise ArgumentError(
            "--qe-clip-acts n_std needs a number of standard deviations.",
            "pass --qe-clip-n-stds with a number above 0.",
        )
    if quantize.qe_clip_acts != "n_std" and quantize.qe_clip_n_stds is not None:
        log_ignored(["qe_clip_n_stds"], "it belongs to --qe-clip-acts n_std")
    if quantize.qe_clip_acts == "none" and quantize.qe_no_clip_layers:
        log_ignored(["qe_no_clip_layers"], "nothing is clipped")
    if quantize.qe_convert_pytorch:
        _check_convert(quantize)


def _check_convert(quantize: QuantizeOptions) -> None:
    """Refuse what the int8 modules of torch do not have."""
    if quantize.qe_dynamic:
        raise ArgumentError(
            "--qe-convert-pytorch needs constant ranges, and --qe-dynamic has others in each batch.",
            "pass --qe-calibration 0.05 in its place.",
        )
    for name in ("qe_bits_acts", "qe_bits_wts"):
        bits = getattr(quantize, name)
        if bits != 8:
            raise ArgumentError(
                f"--qe-convert-pytorch needs 8 bits, and {flag_of(name)} is {bits}.",
                "leave out one of them.",
            )


def check_search(search: SearchOptions, quantize: QuantizeOptions) -> None:
    """Refuse settings that the search replaces or cannot have, and log options of a search that is not done.

    Args:
        search: The options of the search.
        quantize: Those of the quantizer.

    Raises:
        ArgumentError: There are such settings.
    """
    if not search.qe_lapq:
        log_ignored(list_changed(search), "--qe-lapq is not given")
        return
    for name, reason in _REPLACED.items():
        if name in list_changed(quantize):
            raise ArgumentError(
                f"--qe-lapq and {flag_of(name)} exclude each other: {reason}.",
                "leave out one of them.",
            )
    if quantize.qe_config_file is not None:  # the search itself looks at its settings
        return
    if quantize.qe_clip_acts != "none":
        raise ArgumentError(
            f"--qe-lapq searches ranges itself, and --qe-clip-acts is {quantize.qe_clip_acts}.",
            "leave out --qe-clip-acts; --lapq-init-mode says where the search begins.",
        )
    for name in ("qe_mode_acts", "qe_mode_wts"):
        mode = getattr(quantize, name) or quantize.qe_mode
        if mode.startswith("asym") and not search.lapq_search_clipping:
            raise ArgumentError(
                f"--qe-lapq searches scales, and {flag_of(name)} is {mode}, whose zero points depend on them.",
                "add --lapq-search-clipping, or take a symmetric mode.",
            )
