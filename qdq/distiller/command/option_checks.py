"""Options that contradict each other or do nothing together: refused or logged before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qdq.distiller.command.option_flags import flag_of, list_changed, log_ignored
from qdq.errors import ArgumentError

if TYPE_CHECKING:
    from qdq.distiller.command.options import Options
    from qdq.distiller.command.quantize_options import QuantizeOptions
    from qdq.distiller.command.run_options import ModelOptions, TrainingOptions

_FRACTIONS = ("effective_train_size", "effective_valid_size", "effective_test_size")


def check_fractions(options: Options) -> None:
    """Refuse numbers that are no fractions.

    Args:
        options: All options.

    Raises:
        ArgumentError: One is not.
    """
    for name in _FRACTIONS:
        _require_fraction(options.images, name)
    if options.images.activation_histograms is not None:
        _require_fraction(options.images, "activation_histograms")
    if options.quantize.qe_calibration is not None:
        _require_fraction(options.quantize, "qe_calibration")
    _require_fraction(options.search, "lapq_eval_size")
    split = options.images.validation_split
    if not 0 <= split < 1:
        raise ArgumentError(
            f"--validation-split is {split}; expected a fraction of at least 0, and below 1.",
            "pass a fraction such as 0.1.",
        )


def _require_fraction(group: Any, name: str) -> None:
    fraction = getattr(group, name)
    if not 0 < fraction <= 1:  # NaN, too
        raise ArgumentError(
            f"{flag_of(name)} is {fraction}; expected a fraction above 0, and at most 1.",
            "pass a fraction such as 0.05.",
        )


def check_model(model: ModelOptions) -> None:
    """Refuse two devices, or two sources of weights.

    Args:
        model: Its options.

    Raises:
        ArgumentError: There are two.
    """
    if model.cpu and model.gpus is not None:
        raise ArgumentError("--cpu and --gpus exclude each other.", "leave one of them out.")
    if model.pretrained and model.exp_load_weights_from is not None:
        raise ArgumentError(
            "--pretrained and --exp-load-weights-from are two sources of weights.", "choose one."
        )


def check_action(options: Options) -> None:
    """Refuse options that do nothing, or that do two things at once.

    Args:
        options: All options.

    Raises:
        ArgumentError: They do.
    """
    quantize, compress = options.quantize, options.training.compress
    is_collecting = quantize.qe_calibration or options.images.activation_histograms
    if not (options.model.evaluate or is_collecting or compress):
        raise ArgumentError(
            "nothing is to be done; expected --evaluate, --qe-calibration, --activation-histograms or --compress.",
            "to quantize and evaluate, pass --evaluate --quantize-eval.",
        )
    if quantize.quantize_eval and not options.model.evaluate:
        raise ArgumentError("--quantize-eval needs --evaluate.", "add --evaluate.")
    if compress is not None and (options.model.evaluate or is_collecting):
        raise ArgumentError(
            "--compress trains; it excludes --evaluate, --qe-calibration and --activation-histograms.",
            "train first, then pass the checkpoint: --resume-from FILE --evaluate.",
        )


def check_training(training: TrainingOptions) -> None:
    """Refuse a teacher that does not count, and log options of one that is not there.

    Args:
        training: The options.

    Raises:
        ArgumentError: There is such a teacher.
    """
    if training.kd_teacher is not None and training.kd_distill_wt == 0:
        raise ArgumentError(
            "--kd-distill-wt (--kd-dw) is 0, so that the teacher of --kd-teacher does not count.",
            "pass a number above 0, or leave out --kd-teacher.",
        )
    if training.kd_teacher is None:
        ignored = [name for name in list_changed(training) if name.startswith("kd_")]
        log_ignored(ignored, "--kd-teacher is not given")


def check_without_quantizer(options: Options) -> None:
    """Refuse actions on a quantized model where none is made, and log its settings.

    Args:
        options: All options.

    Raises:
        ArgumentError: There is such an action.
    """
    quantize, search = options.quantize, options.search
    for name, is_set in (
        ("qe_lapq", search.qe_lapq),
        ("qe_convert_pytorch", quantize.qe_convert_pytorch),
    ):
        if is_set:
            raise ArgumentError(
                f"{flag_of(name)} needs --evaluate --quantize-eval.", "add them, or leave it out."
            )
    ignored = [name for name in list_changed(quantize) if name != "qe_calibration"]
    log_ignored(ignored, "nothing is quantized after training")


def check_export(options: Options) -> None:
    """Refuse an export without a quantized model, or of one that TensorRT cannot run.

    Args:
        options: All options.

    Raises:
        ArgumentError: They are such options.
    """
    if options.export.file is None:
        log_ignored(list_changed(options.export), "--export-onnx is not given")
        return
    quantize = options.quantize
    if not (quantize.quantize_eval or options.training.compress or options.model.resume_from):
        raise ArgumentError(
            "--export-onnx exports a quantized model, and none is made.",
            "add --evaluate --quantize-eval, or --resume-from with a quantized checkpoint.",
        )
    if quantize.qe_convert_pytorch:
        raise ArgumentError(
            "--export-onnx and --qe-convert-pytorch are two ways to int8.", "choose one of them."
        )
    if quantize.quantize_eval and quantize.qe_config_file is None:
        _check_fit(quantize, options.export.export_convert)


def _check_fit(quantize: QuantizeOptions, export_convert: bool) -> None:
    """Refuse what TensorRT int8 does not have; of a configuration, the export itself says so."""
    if quantize.qe_dynamic:
        raise ArgumentError(
            "--export-onnx needs constant scales, and --qe-dynamic has others in each batch.",
            "pass --qe-calibration 0.05 in its place.",
        )
    unfit = [name for name in ("qe_bits_acts", "qe_bits_wts") if getattr(quantize, name) > 8]
    if quantize.qe_bits_accum != 32:
        unfit.append("qe_bits_accum")
    if unfit:
        bits = getattr(quantize, unfit[0])
        raise ArgumentError(
            f"{flag_of(unfit[0])} is {bits}; TensorRT int8 has codes of 8 bits and sums of 32.",
            f"leave out {flag_of(unfit[0])}, or --export-onnx.",
        )
    for name in ("qe_mode_acts", "qe_mode_wts"):
        mode = getattr(quantize, name) or quantize.qe_mode
        if mode.startswith("asym") and not export_convert:
            raise ArgumentError(
                f"{flag_of(name)} is {mode}, whose codes have a zero point; TensorRT int8 has none.",
                "add --export-convert, which sets new symmetric ranges, or pass --qe-mode sym.",
            )
