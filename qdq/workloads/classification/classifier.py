"""The workload of an image classifier."""

from __future__ import annotations

from qdq.errors import ArgumentError
from qdq.workloads.classification import load_images, load_training_images
from qdq.workloads.classification.models import load_model
from qdq.workloads.workload import Workload, WorkloadOptions


def load_classifier(options: WorkloadOptions) -> Workload:
    """An image classifier with images of a folder, or with the packaged photographs.

    Its metric is accuracy by labels, which `qdq.evaluate_outputs` computes.

    Args:
        options: The model as for `load_model`; the data is a folder with one folder per class, or None.

    Raises:
        ArgumentError: A metric, a number below 1, or an image size that the model cannot use.
        DataError: As for `load_images`.
        DependencyError: As for `load_model`.
        ModelError: As for `load_model`.
    """
    if options.metric is not None:
        raise ArgumentError(
            f"--metric {options.metric} is given, and {options.model} is measured by top-1 and top-5.",
            "leave --metric out; the metric that ranks layers is --rank-by.",
        )
    if options.outputs or options.mask or options.output_weights:
        raise ArgumentError(
            f"{options.model} has one output without padding; --outputs, --mask and --output-weights do not fit it.",
            "leave them out.",
        )
    loaded = load_model(options.model, options.weights, options.seed, options.image_size)
    num_calibration = options.calib_batches * options.batch_size
    amounts = (num_calibration, options.eval_samples, options.batch_size, options.seed)
    calibration, evaluation = load_images(options.data, loaded, *amounts)

    return Workload(
        name=loaded.name,
        weights=loaded.weights,
        module=loaded.module,
        calibration=calibration,
        evaluation=evaluation,
        load_training=lambda: load_training_images(options.data, loaded, None, *amounts),
    )
