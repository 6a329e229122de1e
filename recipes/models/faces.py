"""The three networks of the face detector MTCNN, with the weights of facenet-pytorch.

qdq ptq --model recipes/models/faces.py:build_pnet --data recipes/models/faces.py:batches_pnet \
    --metric recipes/models/faces.py:score_pnet

Likewise rnet and onet. Needs `pip install --no-deps facenet-pytorch` and the extra `demo`.

P-Net proposes boxes at all places and sizes of an image, R-Net sorts them, and O-Net sorts them again and finds eyes,
nose and mouth. The score runs the whole detector with one of the three networks exchanged. Its images are photographs
without faces; faces of known place are pasted into them (LFW, from scikit-image).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from facenet_pytorch import MTCNN
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.ops import box_iou

from qdq.workloads.classification.images import (
    CALIBRATION_PHOTOGRAPHS,
    LABELLED_PHOTOGRAPHS,
    PhotographSource,
    find_photographs,
    read_image,
)

Predict = Callable[[torch.Tensor], dict[str, NDArray[np.float32]]]

STAGE_OUTPUTS = {
    "pnet": ("boxes", "probabilities"),
    "rnet": ("boxes", "probabilities"),
    "onet": ("boxes", "landmarks", "probabilities"),
}
"""Stage of the detector -> names of its outputs, in the order in which facenet-pytorch returns them."""

SCENE_SIZE = 256
SMALLEST_FACE = 32  # pixels
PYRAMID_SIZE = int(SCENE_SIZE * 12 / SMALLEST_FACE + 1)
"""Pixels of the largest image that P-Net sees: it finds faces of 12 pixels."""


class NamedStage(nn.Module):
    """A network of the detector whose outputs have names."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.names = names

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.network(images), strict=True))


def build_pnet() -> nn.Module:
    """P-Net: images `[N, 3, 97, 97]` -> boxes `[N, 4, 44, 44]` and probabilities `[N, 2, 44, 44]`."""
    return _build("pnet")


def build_rnet() -> nn.Module:
    """R-Net: crops `[N, 3, 24, 24]` -> boxes `[N, 4]` and probabilities `[N, 2]`."""
    return _build("rnet")


def build_onet() -> nn.Module:
    """O-Net: crops `[N, 3, 48, 48]` -> boxes `[N, 4]`, landmarks `[N, 10]` and probabilities `[N, 2]`."""
    return _build("onet")


def batches_pnet() -> list[torch.Tensor]:
    """Images of all sizes of the pyramid, at the top left of 97 x 97 pixels."""
    return _batch_inputs("pnet")


def batches_rnet() -> list[torch.Tensor]:
    """Crops that the float P-Net proposes."""
    return _batch_inputs("rnet")


def batches_onet() -> list[torch.Tensor]:
    """Crops that the float P-Net and R-Net leave."""
    return _batch_inputs("onet")


def score_pnet(predict: Predict) -> dict[str, float]:
    """Figures of the detector with another P-Net, see `score_detector`."""
    return score_detector("pnet", predict)


def score_rnet(predict: Predict) -> dict[str, float]:
    """Figures of the detector with another R-Net, see `score_detector`."""
    return score_detector("rnet", predict)


def score_onet(predict: Predict) -> dict[str, float]:
    """Figures of the detector with another O-Net, see `score_detector`."""
    return score_detector("onet", predict)


def score_detector(stage: str, predict: Predict) -> dict[str, float]:
    """Figures of the detector with one network exchanged.

    Args:
        stage: The network: pnet, rnet or onet.
        predict: Its inputs -> its outputs by name.

    Returns:
        recall and precision: of the 32 faces; a face is found by a box whose IoU with its patch is 0.4 or more, since a
            patch has a margin around the face. IoU: mean overlap of the boxes with those of the float detector, 0 where
            there is none.
    """
    scenes, faces = _draw_scenes((LABELLED_PHOTOGRAPHS,), number=8, first_face=50)
    boxes = _detect(PredictedStage(stage, predict), scenes)
    num_found = 0
    num_right = 0
    overlaps: list[float] = []
    for scene_boxes, scene_faces, float_boxes in zip(boxes, faces, _detect_in_float(), strict=True):
        is_match = box_iou(scene_faces, scene_boxes) >= 0.4
        num_found += int(is_match.any(dim=1).sum())
        num_right += int(is_match.any(dim=0).sum())
        overlaps += _best_overlaps(float_boxes, scene_boxes)
    num_faces = sum(len(scene_faces) for scene_faces in faces)
    num_boxes = sum(len(scene_boxes) for scene_boxes in boxes)
    return {
        "recall": num_found / num_faces,
        "precision": num_right / max(num_boxes, 1),
        "IoU": float(np.mean(overlaps)),
    }


class PredictedStage(nn.Module):
    """A network of the detector that is computed by a function.

    Args:
        stage: pnet, rnet or onet.
        predict: Its inputs -> its outputs by name.
    """

    def __init__(self, stage: str, predict: Predict) -> None:
        super().__init__()
        self.stage = stage
        self.predict = predict
        self.dtype_of_images = nn.Parameter(torch.zeros(()))  # the detector asks for it

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        height, width = images.shape[2:]
        named = self.predict(_to_fixed_size(self.stage, images))
        outputs = [torch.from_numpy(named[name]) for name in STAGE_OUTPUTS[self.stage]]
        if self.stage == "pnet":
            outputs = [maps[..., : _map_size(height), : _map_size(width)] for maps in outputs]
        return tuple(outputs)


def _build(stage: str) -> nn.Module:
    network = getattr(_make_detector(), stage)
    return NamedStage(network, STAGE_OUTPUTS[stage]).eval()


def _make_detector() -> MTCNN:
    """The float detector, which is not changed."""
    return MTCNN(keep_all=True, min_face_size=SMALLEST_FACE, device=torch.device("cpu")).eval()


def _batch_inputs(stage: str, batch_size: int = 8) -> list[torch.Tensor]:
    """What a network of the float detector gets, in batches of one size and in random order."""
    scenes, _ = _draw_scenes(CALIBRATION_PHOTOGRAPHS, number=12, first_face=0)
    detector = _make_detector()
    inputs: list[torch.Tensor] = []
    getattr(detector, stage).register_forward_pre_hook(
        lambda _, arguments: inputs.append(_to_fixed_size(stage, arguments[0]))
    )
    detector.detect(scenes)
    images = torch.cat(inputs)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return list(torch.split(images[order], batch_size))


def _to_fixed_size(stage: str, images: torch.Tensor) -> torch.Tensor:
    """Images of the pyramid at one size, because the exported P-Net has one; 0 is grey."""
    if stage != "pnet":
        return images
    height, width = images.shape[2:]
    return nn.functional.pad(images, (0, PYRAMID_SIZE - width, 0, PYRAMID_SIZE - height))


def _map_size(pixels: int) -> int:
    """Size of P-Net's output: a convolution, a pooling that rounds up, two convolutions."""
    return -(-(pixels - 2) // 2) - 4


def _draw_scenes(
    sources: tuple[PhotographSource, ...], number: int, first_face: int
) -> tuple[list[Image.Image], list[torch.Tensor]]:
    """Photographs into which four faces each are pasted, one in each quarter.

    Args:
        sources: Where the photographs are from; they are used in turn.
        number: Number of images.
        first_face: Number of the first face, of 100.

    Returns:
        The images, and for each the boxes of the patches `[4, 4]` as left, top, right, bottom.
    """
    generator = np.random.default_rng(0)
    patches = np.load(Path(skimage.__file__).parent / "data" / "lfw_subset.npy")
    files = find_photographs(sources)
    scenes = []
    faces = []
    for index in range(number):
        scene = read_image(files[index % len(files)]).resize((SCENE_SIZE, SCENE_SIZE))
        boxes = []
        for quarter in range(4):
            patch = Image.fromarray(np.uint8(255 * patches[first_face + 4 * index + quarter]))
            size = int(generator.integers(40, 90))
            offset = generator.integers(0, SCENE_SIZE // 2 - size, 2)
            left = int(offset[0]) + SCENE_SIZE // 2 * (quarter % 2)
            top = int(offset[1]) + SCENE_SIZE // 2 * (quarter // 2)
            scene.paste(patch.resize((size, size)).convert("RGB"), (left, top))
            boxes.append((left, top, left + size, top + size))
        scenes.append(scene)
        faces.append(torch.tensor(boxes, dtype=torch.float32))
    return scenes, faces


def _detect(stage: PredictedStage | None, scenes: list[Image.Image]) -> list[torch.Tensor]:
    """Boxes `[faces, 4]` of each image from the detector with one network exchanged, or none."""
    detector = _make_detector()
    if stage is not None:
        setattr(detector, stage.stage, stage)
    boxes, _ = detector.detect(scenes)
    return [_to_tensor(scene_boxes) for scene_boxes in boxes]


def _to_tensor(boxes: Any) -> torch.Tensor:
    """Boxes of an image; None, if the detector finds nothing."""
    if boxes is None:
        return torch.zeros(0, 4)
    return torch.tensor(np.asarray(boxes, dtype=np.float32))


@functools.cache
def _detect_in_float() -> list[torch.Tensor]:
    """Boxes of the float detector on the images of the score."""
    scenes, _ = _draw_scenes((LABELLED_PHOTOGRAPHS,), number=8, first_face=50)
    return _detect(None, scenes)


def _best_overlaps(expected: torch.Tensor, found: torch.Tensor) -> list[float]:
    """Largest IoU of each expected box with a found one."""
    if not len(found):
        return [0.0] * len(expected)
    return [float(overlap) for overlap in box_iou(expected, found).amax(dim=1)]
