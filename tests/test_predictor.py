"""One function for a batch, whatever computes the outputs."""

import numpy as np
import pytest
import torch
from torch import nn

from qdq import ArgumentTypeError, export_onnx, make_predictor, predict


def test_a_predictor_gives_for_a_batch_what_predict_gives_for_all(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    batches = [torch.randn(2, 3), torch.randn(5, 3)]
    path = export_onnx(model, batches[0], tmp_path / "model.onnx").path
    for candidate in (model, path, str(path)):
        run = make_predictor(candidate)
        outputs = np.concatenate([run(batch) for batch in batches])
        np.testing.assert_array_equal(outputs, predict(candidate, batches))
    parts = {
        "first": lambda named: named["output"][:, :1],
        "rest": lambda named: named["output"][:, 1:],
    }
    assert make_predictor(path, outputs=parts)(batches[1])["rest"].shape == (5, 3)
    with pytest.raises(ArgumentTypeError, match="model is of type int"):
        make_predictor(3)
