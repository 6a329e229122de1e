"""Segmentation networks, images with masks, and the mean IoU against a count by hand."""

import numpy as np
import pytest
import torch

from qdq import ArgumentError, DataError, ModelError, WorkloadOptions, load_workload

pytest.importorskip("torchvision", reason="needs the extra 'demo'")
pytest.importorskip("torchmetrics", reason="mIoU needs torchmetrics")
from PIL import Image

from qdq.workloads.detection.shapes import draw_picture
from qdq.workloads.segmentation.mask_folder import read_mask_folder
from qdq.workloads.segmentation.masked_images import IGNORED, MaskBatches
from qdq.workloads.segmentation.mean_iou import make_score
from qdq.workloads.segmentation.shape_masks import ShapeMasks
from qdq.workloads.segmentation.torchvision_segmenters import build_segmenter, normalize

MODEL = "lraspp_mobilenet_v3_large"


def test_masks_are_where_the_shapes_are():
    masks = ShapeMasks(3, 64, seed=5)
    for index in range(3):
        picture = draw_picture(64, 5, index)
        image, mask = masks[index]
        assert torch.equal(image, normalize(picture.image))
        seen = torch.zeros(64, 64, dtype=torch.bool)
        for box, label in zip(picture.target.boxes, picture.target.labels, strict=True):
            left, top, right, bottom = (int(edge.round()) for edge in box)
            part = mask[top:bottom, left:right]
            covered = float((part == label + 1).float().mean())
            expected = {0: np.pi / 4, 1: 1.0, 2: 0.5}[int(label)]  # circle, square, triangle
            assert covered == pytest.approx(expected, abs=0.1)
            seen[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True
        assert not mask[~seen].any()


class Painted:
    """Two images whose masks are known."""

    description = "painted"

    def __len__(self):
        return 2

    def __getitem__(self, index):
        mask = torch.zeros(4, 4, dtype=torch.int64)
        mask[:2] = 1
        mask[3] = IGNORED
        return torch.full((3, 4, 4), float(index)), mask


def test_mean_iou_by_hand():
    batches = MaskBatches(Painted(), [0, 1], 2, "painted")
    score = make_score(batches, 3)

    def predict(images):
        assert images.shape == (2, 3, 4, 4)
        scores = np.zeros((2, 3, 4, 4), dtype=np.float32)
        scores[:, 1, :1] = 1  # a row of class 1 is right, one is taken for the background
        scores[:, 2, 3] = 1  # ignored pixels count for nothing
        return {"out": scores, "other": scores}

    # class 0: 8 right of 16 in the union; class 1: 8 of 16; class 2: nowhere
    assert score(predict) == {"mIoU": pytest.approx(0.5)}
    few = MaskBatches(ShapeMasks(8, 32), range(8), 8, "shapes")
    with pytest.raises(DataError, match="a mask has the class 3, and the network has 2"):
        make_score(few, 2)(predict)


def write_images(folder, count, size=(20, 30), mask_size=None, mode="L"):
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        pixels = np.full((*size, 3), 10 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        mask = np.full(mask_size or size, index % 3, dtype=np.uint8)
        Image.fromarray(mask).convert(mode).save(folder / "masks" / f"{index}.png")
    return folder


def test_images_of_a_folder_are_fitted_into_squares(tmp_path):
    train, val = read_mask_folder(write_images(tmp_path, 5), 60)
    assert (len(train), len(val)) == (2, 3)
    assert {*train.files, *val.files} == set((tmp_path / "images").iterdir())
    image, mask = val[0]
    index = int(val.files[0].stem)
    assert (mask[:40] == index % 3).all()
    assert (mask[40:] == IGNORED).all()
    source = torch.full((3, 1, 1), 10 * index, dtype=torch.uint8)
    torch.testing.assert_close(image[:, :40], normalize(source).expand(3, 40, 60))
    assert not image[:, 40:].any()
    for name in ("train", "val"):
        write_images(tmp_path / name, 1)
    train, val = read_mask_folder(tmp_path, 60)
    assert (len(train), len(val)) == (1, 1)


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="has no folder images"):
        read_mask_folder(tmp_path, 60)
    folder = write_images(tmp_path / "unmasked", 2)
    (folder / "masks" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images in .* have no mask: 1.png"):
        read_mask_folder(folder, 60)
    train, val = read_mask_folder(write_images(tmp_path / "small", 2, mask_size=(5, 5)), 60)
    with pytest.raises(DataError, match=r"is \[5, 5\], and its image \[20, 30\]"):
        train[0]
    train, val = read_mask_folder(write_images(tmp_path / "colour", 2, mode="RGB"), 60)
    with pytest.raises(DataError, match="has the mode RGB; expected one number a pixel"):
        val[0]
    with pytest.raises(DataError, match="has 1 image; expected at least 2"):
        read_mask_folder(write_images(tmp_path / "one", 1), 60)


def test_network_of_torchvision_with_a_checkpoint(tmp_path):
    trained = build_segmenter(MODEL, 6, seed=3)
    state = {**trained.state_dict(), "aux_classifier.0.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "six.pth")
    options = {"calib_batches": 1, "eval_samples": 3, "batch_size": 2, "image_size": 96}
    workload = load_workload(WorkloadOptions(MODEL, str(tmp_path / "six.pth"), **options))
    assert len(workload.example.inputs) == 2
    assert [len(batch.inputs) for batch in workload.evaluation] == [2, 1]
    with torch.no_grad():
        assert workload.module(workload.example.inputs)["out"].shape == (2, 6, 96, 96)
    assert 0 <= workload.measure(workload.module)["mIoU"] < 1
    assert workload.num_held_out == 1
    training, fitted, held_out = workload.split_training()
    assert [*held_out.indices, *fitted.indices] == [*workload.calibration.indices]
    assert training.num_samples == 1999
    assert not {*training.indices} & {*held_out.indices}
    with pytest.raises(ArgumentError, match="is measured by mean IoU"):
        load_workload(WorkloadOptions(MODEL, "random", metric="a.py:f"))
    with pytest.raises(ModelError, match="unknown weights 'best'"):
        load_workload(WorkloadOptions(MODEL, "best"))
