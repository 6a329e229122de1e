"""From a trained PyTorch model to a verified TensorRT int8 engine.

A name of the public API (`__init__.pyi` lists them) loads its module on first use, so that `import qdq` is light.
"""

import importlib
from typing import Any

from qdq.lazy import list_homes, load_name

__version__ = "0.1.0"

_HOMES = {
    "accuracy.adaround": ("Rounding", "round_weights"),
    "accuracy.bias": ("BiasCorrection", "correct_bias"),
    "accuracy.blocks": ("Reconstruction", "reconstruct_blocks"),
    "accuracy.centering": ("Centering", "center_inputs"),
    "accuracy.equalization": ("Equalization", "equalize_layers"),
    "accuracy.smoothing": ("Smoothing", "smooth_inputs"),
    "accuracy.splitting": ("Splitting", "split_channels"),
    "analyze": ("Analysis", "analyze_layers"),
    "batch": ("Labelled",),
    "bisect": ("Bisection", "bisect_pairs"),
    "build": ("BuildReport", "build_engine"),
    "bundle": ("BundleReport", "make_bundle"),
    "calibrate": ("Calibration", "calibrate_model", "solve_ranges"),
    "calibrate.collect": ("collect_statistics",),
    "check": ("CHECKED_SAMPLES", "CheckReport", "check_onnx"),
    "check.rules": ("register_rule",),
    "distributed": ("shard_batches",),
    "errors": (
        "ArgumentError",
        "ArgumentTypeError",
        "BuildError",
        "CalibrationError",
        "CheckError",
        "DataError",
        "DependencyError",
        "ExportError",
        "ModelError",
        "QdqError",
        "StateError",
    ),
    "detector": ("SplitDetector", "split_detector"),
    "device": ("choose_device", "describe_device", "find_sm"),
    "diverge": ("Divergence", "find_divergence"),
    "evaluate": ("Evaluation", "evaluate_outputs", "measure_tie_floor"),
    "export": ("ExportReport", "export_onnx"),
    "fold": ("fold_batchnorm",),
    "formats": ("Format", "parse_formats"),
    "gate": ("GateReport", "gate_run"),
    "judge": ("Judge", "JudgedSteps"),
    "mixed": ("FormatChoice", "choose_formats"),
    "nn": ("register_module",),
    "plan": ("Plan", "apply_plan", "diff_plans", "load_plan", "save_plan"),
    "predictor": ("make_predictor", "predict"),
    "qat": ("Tuning", "finetune"),
    "qat.checkpoint": ("load_tuned", "save_tuned"),
    "qat.losses": ("Distillation", "cross_entropy"),
    "qat.weight_tuning": ("WeightTuning", "tune_weights"),
    "quantize": ("fake_quantize",),
    "quantizer": (
        "QuantDescriptor",
        "TensorQuantizer",
        "disable_quantization",
        "enable_quantization",
    ),
    "range_files": ("RangeExport", "RangeImport", "export_ranges", "import_ranges"),
    "recover": ("FITTED_SAMPLES", "recover_accuracy", "refit_passes"),
    "references": ("save_references",),
    "report": ("write_report",),
    "report.compare": ("compare_runs",),
    "report.explain": ("explain_layer",),
    "report.target_runs": ("write_targets",),
    "rewire": ("RewirePlan", "rewire_operations"),
    "roofline": ("find_target_sm",),
    "run": ("Run", "check_run_folder", "start_run"),
    "schedule": ("Schedule",),
    "statistics": ("Statistics",),
    "swap": ("SwapPlan", "plan_swap", "restore_modules", "swap_modules"),
    "trt.backend": ("find_backend",),
    "workloads": ("load_workload",),
    "workloads.classification": ("load_images", "load_training_images"),
    "workloads.classification.models": ("load_model",),
    "workloads.sample_batches": ("SampleBatches",),
    "workloads.workload": ("Workload", "WorkloadOptions"),
}
_HOME_OF = list_homes(_HOMES)
_PACKAGES = ("distiller", "systems")  # public packages with names of their own

__all__ = sorted([*_HOME_OF, *_PACKAGES, "__version__"])  # the literal list is in __init__.pyi


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    return load_name(__name__, _HOME_OF, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF, *_PACKAGES})
