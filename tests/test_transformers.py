"""Models of transformers by their own inputs, with random weights."""

import numpy as np
import pytest
import torch

from qdq import (
    calibrate_model,
    export_onnx,
    fold_batchnorm,
    predict,
    rewire_operations,
    swap_modules,
)
from qdq.errors import ArgumentTypeError

transformers = pytest.importorskip("transformers")

PIXELS = {"pixel_values": torch.randn(2, 3, 64, 64)}
TOKENS = {
    "input_ids": torch.randint(0, 100, (2, 12)),
    "attention_mask": torch.ones(2, 12, dtype=torch.int64),
}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def make_resnet_config(**options):
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    return transformers.ResNetConfig(**sizes, layer_type="basic", **options)


def build_resnet():
    return transformers.ResNetForImageClassification(make_resnet_config())


def build_vit():
    config = transformers.ViTConfig(**SMALL, image_size=64, patch_size=16)
    return transformers.ViTForImageClassification(config)


def build_bert():
    return transformers.BertModel(transformers.BertConfig(**SMALL, vocab_size=100))


def build_detr():
    sizes = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {"layers": 1, "attention_heads": 2, "ffn_dim": 64}.items()
    }
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=make_resnet_config(out_features=["stage2"]),
        d_model=32,
        num_queries=10,
        **sizes,
    )
    return transformers.DetrForObjectDetection(config)


def build_gpt2():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("build", "inputs", "functions"),
    [
        (build_resnet, PIXELS, {"add", "max_pool2d"}),
        (build_vit, PIXELS, {"add", "cat"}),
        (build_bert, TOKENS, {"add"}),
        (
            build_detr,
            {**PIXELS, "pixel_mask": torch.ones(2, 64, 64, dtype=torch.int64)},
            {"add", "cat", "interpolate"},
        ),
    ],
    ids=["resnet", "vit", "bert", "detr"],
)
def test_its_own_inputs_reach_every_call_of_a_model(build, inputs, functions, tmp_path):
    torch.manual_seed(0)
    model = build().eval()
    batch = transformers.BatchEncoding(inputs)
    fold_batchnorm(model, batch)
    swap_modules(model, batch)
    rewired = rewire_operations(model, batch)
    assert {operation.function for operation in rewired.operations} >= functions
    calibrate_model(model, [batch])
    report = export_onnx(model, batch, tmp_path / "model.onnx")
    assert list(report.inputs) == list(inputs)
    assert all(shape[0] == "batch" for shape in report.inputs.values())


def test_the_shortcuts_of_resnet_are_quantized_as_by_tensor():
    plans = []
    for batch in (PIXELS["pixel_values"], transformers.BatchEncoding(PIXELS)):
        torch.manual_seed(0)
        model = build_resnet().eval()
        fold_batchnorm(model, batch)
        swap_modules(model, batch)
        plans.append(rewire_operations(model, batch))
    assert plans[0] == plans[1]
    assert [operation.function for operation in plans[1].of("quantize")] == ["add", "add"]


def test_the_cache_of_a_decoder(tmp_path):
    model = build_gpt2().eval()
    with torch.no_grad():
        cache = model(**TOKENS, use_cache=True).past_key_values
    with pytest.raises(ArgumentTypeError, match="past_key_values is a DynamicCache") as caught:
        swap_modules(model, {**TOKENS, "past_key_values": cache})
    assert "use_cache = False" in caught.value.fix

    model.config.use_cache = False
    report = export_onnx(model, TOKENS, tmp_path / "model.onnx")
    np.testing.assert_allclose(
        predict(report.path, [TOKENS]), predict(model, [TOKENS]), rtol=1e-3, atol=1e-4
    )
