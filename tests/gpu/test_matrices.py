"""Matrix products on a device: the vendor's, through our packed forms, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.rig import make_rig
from tests.kernels import test_gated_linear, test_linear
from tests.kernels.on_device import OnDevice


@pytest.fixture(params=["pretend", pytest.param("cuda", marks=pytest.mark.gpu)])
def ops(request) -> OnDevice:
    rig = make_rig(request.param)
    return OnDevice(rig.backend, rig.device.type)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_products_equal_float64_within_rounding(ops, dtype):
    for shape in ((1, 1, 1), (0, 4, 4), (29, 576, 96), (5, 3100, 64)):
        test_linear.test_linear_equals_float64_within_rounding(ops, shape, dtype)
    for shape in ((0, 8, 16), (3, 5, 7), (33, 70, 40)):
        test_gated_linear.test_gated_linear_equals_linear_then_activation(ops, shape, dtype)
