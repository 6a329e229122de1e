"""`reduce_amax` against numpy in float64; handlers of the root logger."""

import itertools
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from qdq.compat import utils
from qdq.compat.utils import reduce_amax
from qdq.compat.utils.quant_logging import reset_logger_handler
from qdq.errors import QdqError

X = torch.randn(3, 1, 4, 2, generator=torch.Generator().manual_seed(7))
AXES = [
    None,
    0,
    -1,
    *(axes for count in (1, 2, 3, 4) for axes in itertools.combinations(range(4), count)),
    (-1, 0),
]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("keepdims", [True, False])
def test_against_numpy(axis, keepdims):
    result = reduce_amax(X, axis=axis, keepdims=keepdims)
    truth = np.abs(X.double().numpy()).max(axis=axis, keepdims=keepdims)
    truth = truth.reshape(()) if truth.size == 1 else truth
    assert tuple(result.shape) == truth.shape
    assert np.array_equal(result.double().numpy(), truth)


def test_defaults_and_lists():
    assert reduce_amax(X).dim() == 0
    assert reduce_amax(X, [1, 2, 3]).shape == (3, 1, 1, 1)
    assert reduce_amax(X, (np.int64(1), 2, 3)).shape == (3, 1, 1, 1)
    assert torch.equal(reduce_amax(X, ()), X.abs())
    assert reduce_amax(torch.tensor([[[-3.0]]]), 1).shape == ()
    assert reduce_amax(torch.tensor(-3.0)).item() == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
def test_type_is_kept(dtype):
    result = reduce_amax((X * 10).to(dtype), (0, 2))
    assert result.dtype == dtype
    assert np.array_equal(
        result.double().numpy(),
        (X * 10).to(dtype).double().abs().numpy().max((0, 2), keepdims=True),
    )


def test_no_gradient_and_no_shared_memory():
    x = X.clone().requires_grad_()
    result = reduce_amax(x, ())
    assert not result.requires_grad
    result.fill_(9)
    assert torch.equal(x, X)


def test_nan_shows():
    assert reduce_amax(torch.tensor([1.0, float("nan")])).isnan()


@pytest.mark.parametrize(
    ("input", "axis", "kind", "words"),
    [
        (X, (0, 1, 2, 3, 0), ValueError, "Cannot reduce more axes"),
        (torch.tensor(1.0), 0, ValueError, "Cannot reduce more axes"),
        (X, 4, ValueError, r"axis 4 is out of range .*\(3, 1, 4, 2\)"),
        (X, (0, -5), ValueError, "out of range"),
        (X, "0", TypeError, "axis is '0'"),
        (X, 1.0, TypeError, "axis is 1.0"),
        (X, (0, None), TypeError, r"axis is \(0, None\)"),
        ([1.0], None, TypeError, "input is a list, not a tensor"),
        (torch.empty(0, 3), None, ValueError, "empty tensor of shape"),
        (torch.empty(0, 3), 0, ValueError, "empty tensor of shape"),
    ],
)
def test_wrong_input(input, axis, kind, words):
    with pytest.raises(kind, match=words) as error:
        reduce_amax(input, axis)
    assert isinstance(error.value, QdqError)


def test_only_reduced_axes_must_have_elements():
    assert reduce_amax(torch.empty(0, 3), 1).shape == (0, 1)


def test_reset_takes_all_handlers_of_the_root_logger():
    root = logging.getLogger()
    before = root.handlers[:]
    try:
        root.handlers[:] = [logging.NullHandler(), logging.StreamHandler(), logging.NullHandler()]
        assert utils.quant_logging.reset_logger_handler is reset_logger_handler
        reset_logger_handler()
        assert root.handlers == []
    finally:
        root.handlers[:] = before


def test_import_leaves_the_root_logger_alone():
    code = (
        "import logging; handler = logging.StreamHandler(); logging.getLogger().addHandler(handler);"
        "import qdq.compat.utils.quant_logging, qdq.compat.optim.helper, qdq.compat.nn.functional;"
        "assert logging.getLogger().handlers == [handler]; assert logging.getLogger().level == logging.WARNING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
