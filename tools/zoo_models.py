"""The models of the zoo sweep: torchvision's families and a list of timm architectures, all with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from qdq.forward import evaluating

Shape = tuple[int, ...]
# Random MobileNets shrink their values a thousandfold in every few blocks, and fusions of ONNX Runtime treat ranges
# below about 1e-6 as zero (ClipQuantFusion drops a ReLU6 before such a quantizer).
_SMALLEST_OUTPUT = 1e-3
_SMALLEST_VARIATION = 1e-3  # of an output between images, as a fraction of its largest value
_SMALLEST_PARAMETER = 1e-3


@dataclass(frozen=True)
class Entry:
    """One model of the sweep.

    Args:
        build: Builds the model, in training mode or not.
        shape: Shape of one input, without the batch.
    """

    build: Callable[[], nn.Module]
    shape: Shape


class _Detector(nn.Module):
    """Backbone and heads of a torchvision detector.

    The selection of boxes between them is left out: its shapes depend on the values, so it cannot run in an engine. The
    heads of the second stage get the first feature map, pooled to the size of a region.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> list[Tensor]:
        detector = self.detector
        features = detector.backbone(images)
        maps = [features] if isinstance(features, Tensor) else list(features.values())
        if not hasattr(detector, "rpn"):
            return list_tensors(detector.head(maps))
        outputs = list_tensors(detector.rpn.head(maps))
        heads = detector.roi_heads
        region = nn.functional.adaptive_avg_pool2d(maps[0], 7)
        outputs += list_tensors(heads.box_predictor(heads.box_head(region)))
        for kind in ("mask", "keypoint"):
            head = getattr(heads, f"{kind}_head", None)
            if head is not None:
                predictor = getattr(heads, f"{kind}_predictor")
                region = nn.functional.adaptive_avg_pool2d(maps[0], 14)
                outputs += list_tensors(predictor(head(region)))
        return outputs


def list_tensors(tree: Any) -> list[Tensor]:
    """The tensors in a tree of outputs, in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _torchvision(name: str, size: int, **options: Any) -> tuple[str, Entry]:
    def build() -> nn.Module:
        module: nn.Module = torchvision.models.get_model(name, weights=None, **options)
        return module

    return f"torchvision/{name}", Entry(build, (3, size, size))


def _detector(name: str, size: int) -> tuple[str, Entry]:
    def build() -> nn.Module:
        return _Detector(torchvision.models.get_model(name, weights=None, weights_backbone=None))

    return f"torchvision/{name}", Entry(build, (3, size, size))


def _segmentation(name: str, size: int) -> tuple[str, Entry]:
    return _torchvision(name, size, weights_backbone=None)


def _video(name: str, frames: int, size: int) -> tuple[str, Entry]:
    key, entry = _torchvision(name, size)
    return key, Entry(entry.build, (3, frames, size, size))


def _timm(name: str, size: int, **options: Any) -> tuple[str, Entry]:
    def build() -> nn.Module:
        module: nn.Module = importlib.import_module("timm").create_model(
            name, pretrained=False, **options
        )
        return module

    return f"timm/{name}", Entry(build, (3, size, size))


def _sized(name: str, size: int) -> tuple[str, Entry]:
    """A timm model whose weights depend on the image size."""
    return _timm(name, size, img_size=size)


MODELS: dict[str, Entry] = dict(
    [
        # classification, every family
        _torchvision("alexnet", 96),
        _torchvision("convnext_tiny", 96),
        _torchvision("densenet121", 96),
        _torchvision("efficientnet_b0", 96),
        _torchvision("efficientnet_v2_s", 96),
        _torchvision("googlenet", 96, aux_logits=False, transform_input=True, init_weights=False),
        _torchvision(
            "inception_v3", 128, aux_logits=False, transform_input=True, init_weights=False
        ),
        _torchvision("maxvit_t", 224),
        _torchvision("mnasnet0_5", 96),
        _torchvision("mobilenet_v2", 96),
        _torchvision("mobilenet_v3_small", 96),
        _torchvision("regnet_x_400mf", 96),
        _torchvision("regnet_y_400mf", 96),
        _torchvision("resnet18", 96),
        _torchvision("resnet50", 96),
        _torchvision("resnext50_32x4d", 96),
        _torchvision("shufflenet_v2_x0_5", 96),
        _torchvision("squeezenet1_1", 96),
        _torchvision("swin_t", 64),
        _torchvision("swin_v2_t", 64),
        _torchvision("vgg11_bn", 64),
        _torchvision("vit_b_16", 64, image_size=64),
        _torchvision("wide_resnet50_2", 96),
        # detection: backbone and heads
        _detector("fasterrcnn_resnet50_fpn", 128),
        _detector("fasterrcnn_resnet50_fpn_v2", 128),
        _detector("fasterrcnn_mobilenet_v3_large_320_fpn", 128),
        _detector("fcos_resnet50_fpn", 128),
        _detector("keypointrcnn_resnet50_fpn", 128),
        _detector("maskrcnn_resnet50_fpn", 128),
        _detector("retinanet_resnet50_fpn", 128),
        _detector("ssd300_vgg16", 300),
        _detector("ssdlite320_mobilenet_v3_large", 320),
        # segmentation
        _segmentation("deeplabv3_mobilenet_v3_large", 128),
        _segmentation("deeplabv3_resnet50", 128),
        _segmentation("fcn_resnet50", 128),
        _segmentation("lraspp_mobilenet_v3_large", 128),
        # video
        _video("mc3_18", 4, 56),
        _video("mvit_v1_b", 16, 224),
        _video("mvit_v2_s", 16, 224),
        _video("r2plus1d_18", 4, 56),
        _video("r3d_18", 4, 56),
        _video("s3d", 16, 224),
        _video("swin3d_t", 4, 64),
        # timm, by its modules
        _sized("beit_base_patch16_224", 64),
        _timm("botnet26t_256", 256),
        _timm("halonet26t", 256),
        _timm("lambda_resnet26t", 128),
        _timm("mobileone_s0", 96),
        _timm("repvgg_a0", 96),
        _timm("gcresnext26ts", 96),
        _sized("cait_xxs24_224", 64),
        _sized("coat_lite_tiny", 64),
        _sized("convit_tiny", 64),
        _timm("convmixer_768_32", 64),
        _timm("convnext_atto", 64),
        _timm("convnextv2_atto", 64),
        _timm("crossvit_9_240", 240),
        _timm("cs3darknet_focus_s", 96),
        _timm("davit_tiny", 96),
        _sized("deit3_small_patch16_224", 64),
        _timm("densenetblur121d", 64),
        _timm("dla34", 96),
        _timm("dpn68", 96),
        _timm("edgenext_xx_small", 96),
        _timm("efficientformer_l1", 224),
        _timm("efficientformerv2_s0", 224),
        _timm("tf_efficientnetv2_b0", 96),
        _timm("mixnet_s", 96),
        _timm("mobilenetv4_conv_small", 96),
        _timm("efficientvit_b0", 96),
        _timm("efficientvit_m0", 224),
        _sized("eva02_tiny_patch14_224", 56),
        _timm("fasternet_t0", 96),
        _timm("fastvit_t8", 96),
        _timm("focalnet_tiny_srf", 64),
        _timm("gcvit_xxtiny", 224),
        _timm("ghostnet_100", 96),
        _timm("hgnetv2_b0", 96),
        _timm("hiera_tiny_224", 224),
        _timm("hrnet_w18_small", 96),
        _timm("inception_next_atto", 96),
        _timm("inception_resnet_v2", 128),
        _timm("levit_128s", 224),
        _timm("mambaout_femto", 64),
        _sized("coatnet_nano_rw_224", 224),
        _timm("poolformer_s12", 64),
        _timm("caformer_s18", 64),
        _sized("mixer_s32_224", 64),
        _sized("gmlp_ti16_224", 64),
        _sized("resmlp_12_224", 64),
        _timm("mobilevit_xxs", 96),
        _timm("mobilevitv2_050", 96),
        _timm("mvitv2_tiny", 224),
        _timm("nest_tiny_jx", 224),
        _timm("nextvit_small", 64),
        _timm("eca_nfnet_l0", 64),
        _timm("nf_regnet_b0", 64),
        _timm("pit_ti_224", 224),
        _timm("pvt_v2_b0", 64),
        _timm("rdnet_tiny", 64),
        _timm("repghostnet_050", 96),
        _timm("repvit_m0_9", 64),
        _timm("res2net50_26w_4s", 64),
        _timm("resnest14d", 64),
        _timm("ecaresnet26t", 96),
        _timm("resnetv2_50x1_bit", 64),
        _timm("rexnet_100", 96),
        _timm("selecsls42b", 96),
        _timm("legacy_seresnet18", 96),
        _timm("sequencer2d_s", 224),
        _timm("shvit_s1", 96),
        _timm("skresnet18", 96),
        _timm("starnet_s1", 96),
        _timm("swiftformer_xs", 224),
        _sized("swinv2_cr_tiny_224", 224),
        _timm("tiny_vit_5m_224", 224),
        _sized("tnt_s_patch16_224", 64),
        _timm("tresnet_m", 64),
        _sized("twins_svt_small", 224),
        _sized("visformer_tiny", 64),
        _sized("vit_tiny_r_s16_p8_224", 64),
        _sized("vit_relpos_small_patch16_224", 64),
        _timm("volo_d1_224", 224),
        _timm("ese_vovnet19b_dw", 96),
        _timm("xception41p", 96),
        _timm("xcit_nano_12_p16_224", 64),
    ]
)


def select_models(patterns: Iterable[str]) -> list[str]:
    """Names of the models that match a pattern, in the order of the list.

    Args:
        patterns: Globs of names, with or without the library prefix; all models if there are none.
    """
    globs = tuple(patterns) or ("*",)
    return [name for name in MODELS if _matches(name, globs)]


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    _, _, short_name = name.partition("/")
    return any(fnmatchcase(name, glob) or fnmatchcase(short_name, glob) for glob in globs)


def make_batches(shape: Shape, batches: int, batch_size: int) -> list[Tensor]:
    """Smooth noise with edges and flat parts; every image has its own brightness and contrast.

    Args:
        shape: Shape of one image.
        batches: Number of batches.
        batch_size: Images per batch.
    """
    generator = torch.Generator().manual_seed(0)
    stacked = []
    for start in range(0, batches * batch_size, batch_size):
        indices = range(start, start + batch_size)
        stacked.append(torch.stack([_make_image(shape, index, generator) for index in indices]))
    return stacked


def _make_image(shape: Shape, index: int, generator: torch.Generator) -> Tensor:
    coarse_sides = [min(side, 3 + index % 5) for side in shape[1:]]
    coarse = torch.randn(1, shape[0], *coarse_sides, generator=generator)
    smooth = nn.functional.interpolate(coarse, shape[1:])[0]
    fine = torch.randn(*shape, generator=generator)
    contrast = 0.7 + 0.1 * (index % 5)
    brightness = 0.2 * (index % 3) - 0.2
    return contrast * smooth + 0.5 * fine + brightness


def revive(model: nn.Module) -> int:
    """Give parameters that are almost zero values as after training; otherwise whole branches are dead.

    Examples are heads and class tokens of zeros, zero gains at the end of residual blocks, and layer scales of 1e-6.
    Biases do not change.

    Returns:
        Number of parameters that were changed.
    """
    num_changed = 0
    for name, parameter in model.named_parameters():
        if not _is_dead(name, parameter):
            continue
        with torch.no_grad():
            if parameter.squeeze().dim() >= 2 or name.endswith("token"):
                parameter.normal_(std=0.02)
            else:
                parameter.uniform_(0.2, 0.6)
        num_changed += 1
    return num_changed


def _is_dead(name: str, parameter: nn.Parameter) -> bool:
    if name.endswith("bias") or parameter.numel() < 2:
        return False
    return bool(parameter.abs().max() <= _SMALLEST_PARAMETER)


def is_degenerate(outputs: list[Tensor]) -> bool:
    """Whether an output contains NaN or Inf, is almost zero, or hardly depends on the image."""
    for output in outputs:
        largest = output.abs().max()
        if not bool(torch.isfinite(output).all()) or largest < _SMALLEST_OUTPUT:
            return True
        if (output - output[:1]).abs().max() <= _SMALLEST_VARIATION * largest:
            return True
    return False


def warm_batchnorm(model: nn.Module, batches: list[Tensor]) -> None:
    """Compute the running statistics of every BatchNorm from the batches, as in a trained model."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.momentum = None
            norm.reset_running_stats()
            norm.train()
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def forward(model: nn.Module, batches: list[Tensor]) -> list[Tensor]:
    """All outputs of a model on all batches, each `[N, ...]`."""
    with evaluating(model):
        outputs_of_batches = [list_tensors(model(batch)) for batch in batches]
    return [torch.cat(parts) for parts in zip(*outputs_of_batches, strict=True)]
