"""Semantic segmentation: networks of torchvision, images with masks, and mean intersection over union."""

from __future__ import annotations

from pathlib import Path

from qdq.errors import ArgumentError
from qdq.workloads.sample_batches import draw_indices
from qdq.workloads.segmentation.mask_folder import read_mask_folder
from qdq.workloads.segmentation.masked_images import MaskBatches, MaskedImages
from qdq.workloads.segmentation.mean_iou import make_score
from qdq.workloads.segmentation.shape_masks import NUM_CLASSES, ShapeMasks
from qdq.workloads.segmentation.torchvision_segmenters import load_torchvision_segmenter
from qdq.workloads.workload import Workload, WorkloadOptions

_FOLDER_SIZE = 512  # side of the images of a folder
_SHAPE_SIZE = 160  # side of the generated pictures
_TRAINING_SHAPES = 2000  # generated pictures to fine-tune on


def load_segmenter(options: WorkloadOptions) -> Workload:
    """A segmentation network of torchvision with images and masks; its metric is the mean IoU.

    Args:
        options: The model is a name of torchvision, its weights as for `load_torchvision_segmenter`. The data is a
            folder as for `read_mask_folder`; without one there are generated pictures of shapes. The side of the images
            defaults to 512 pixels for a folder, and to 160 for generated pictures.

    Raises:
        ArgumentError: A number below 1, or a metric.
        DataError: The folder cannot be read.
        DependencyError: A package is not installed.
        ModelError: The model or its weights cannot be loaded, or it has fewer classes than the masks.
    """
    if options.metric is not None:
        raise ArgumentError(
            f"--metric {options.metric} is given, and {options.model} is measured by mean IoU.",
            "leave --metric out, or build the model yourself: --model FILE.py:FUNCTION.",
        )
    train, val = _open(options)
    loaded = load_torchvision_segmenter(options.model, options.weights, NUM_CLASSES, options.seed)

    def take(images: MaskedImages, count: int) -> MaskBatches:
        indices, description = draw_indices(images, count, options.seed)
        return MaskBatches(images, indices, options.batch_size, description)

    evaluation = take(val, options.eval_samples)
    return Workload(
        name=options.model,
        weights=loaded.weights,
        module=loaded.module,
        calibration=take(train, options.calib_batches * options.batch_size),
        evaluation=evaluation,
        load_training=lambda: take(train, len(train)),
        score=make_score(evaluation, loaded.num_classes),
        outputs=options.outputs,
        mask=options.mask,
        output_weights=options.output_weights,
    )


def _open(options: WorkloadOptions) -> tuple[MaskedImages, MaskedImages]:
    """Images to train and to calibrate on, and images to evaluate on."""
    if options.data is not None:
        side = options.image_size or _FOLDER_SIZE
        return read_mask_folder(Path(options.data), side, options.seed)
    side = options.image_size or _SHAPE_SIZE
    train = ShapeMasks(_TRAINING_SHAPES, side, 2 * options.seed)
    return train, ShapeMasks(options.eval_samples, side, 2 * options.seed + 1)
