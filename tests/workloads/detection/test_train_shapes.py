"""The recipe that trains a detector on generated pictures."""

import json

import pytest
import torch

from qdq.cli.recipes import load_recipe
from qdq.workloads.detection.pictures import Target

pytest.importorskip("torchmetrics")

recipe = load_recipe("train_shapes")


def test_a_mirrored_picture_keeps_its_objects():
    images = torch.zeros(1, 3, 8, 8)
    images[0, :, 2:4, 1:6] = 1
    target = Target(torch.tensor([[1.0, 2.0, 6.0, 4.0]]), torch.tensor([2]))
    mirrored, (moved,) = recipe.mirror(images, [target])
    assert moved.boxes.tolist() == [[2.0, 2.0, 7.0, 4.0]]
    assert moved.labels.tolist() == [2]
    assert bool((mirrored[0, :, 2:4, 2:7] == 1).all())
    assert mirrored.sum() == images.sum()


def test_two_steps_give_a_file_that_loads(tmp_path, capsys):
    output, figures = tmp_path / "new" / "ssdlite.pt", tmp_path / "figures.json"
    code = recipe.train_shapes(
        output=output,
        model="ssdlite320_mobilenet_v3_large",
        size=64,
        steps=2,
        pictures=4,
        batch_size=2,
        evaluation=2,
        json=figures,
    )
    assert code == 0
    assert "2 steps, mAP 0." in capsys.readouterr().out
    assert len(json.loads(figures.read_text())["losses"]) == 2
    assert "head.classification_head.module_list.0.1.weight" in torch.load(
        output, weights_only=True
    )
