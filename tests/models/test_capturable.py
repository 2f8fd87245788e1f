"""A forward pass that a graph can hold: it creates nothing from host values, and reads nothing back to the host."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batchinfer_kernels.contract import StepInputs
from batchinfer_kernels.eager import EagerBackend
from batchinfer_kernels.formats import Precision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batchinfer.layers.rotary import RopeConfig, Rotary
from batchinfer.models.precision import WeightPrecision
from batchinfer.models.weights import load_decoder
from batchinfer.ops.pretend import PretendStreams
from batchinfer.ops.resources import HOST
from batchinfer.ops.staging import StagingRing
from tests.models.tiny import MODELS, build

META = torch.device("meta")
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "item")
"""Ops whose result or its shape the host waits for."""


class DeviceAlone(TorchDispatchMode):
    """Refuses ops with a tensor on the host, and those that the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(WAITS), f"{name} waits for the device"
        self._check(name, (args, kwargs))
        found = func(*args, **(kwargs or {}))
        self._check(name, found)
        return found

    def _check(self, name, values):
        for tensor in tree_leaves(values):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device == META, f"{name} has a tensor on {tensor.device}"


class ShapesBackend(EagerBackend):
    """The eager backend where there is no data; what reads a step on the host returns shapes alone."""

    def __init__(self):
        super().__init__(META)
        self.capabilities = replace(self.capabilities, dtype_of_activations=True)

    def prepare(self, step, kv_N2KBD, attention):
        return None

    def rope_kv_write(self, q_THD, k_TKD, v_TKD, cos_sin, kv_N2KBD, index):
        assert cos_sin is None or all(part.device == META and len(part) == len(q_THD) for part in cos_sin)

    def paged_attention(self, q_THD, kv_N2KBD, index, rule, out_THD=None):
        return torch.empty_like(q_THD)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_stays_on_the_device(name, tmp_path):
    build(name, tmp_path)
    staging = StagingRing(PretendStreams(), HOST, 1 << 16)
    precision = WeightPrecision.of_all(Precision.BFLOAT16)
    decoder = load_decoder(tmp_path, precision, backend=ShapesBackend(), staging=staging)
    layers, heads, size = decoder.config.kv_shape
    caches = [torch.empty(5, 2, heads, 4, size, dtype=torch.bfloat16, device=META) for _ in range(layers)]
    words = [torch.empty(shape, dtype=torch.int32, device=META) for shape in (7, 7, 7, (3, 9), 4, 3)]
    inputs = StepInputs(*words, torch.empty(3, dtype=torch.bool, device=META), None, max_length=36)
    with torch.inference_mode(), DeviceAlone():
        for _ in range(2):
            logits = decoder.logits(decoder(inputs, caches))
    assert logits.shape == (7, decoder.config.vocab_size)


def test_a_table_that_moves_when_it_is_first_used_is_seen():
    rotary = Rotary(RopeConfig(8, 1e4), 64)
    with DeviceAlone(), pytest.raises(AssertionError, match="on cpu"):
        rotary.cos_sin(torch.empty(3, dtype=torch.int32, device=META))
    with DeviceAlone(), pytest.raises(AssertionError, match="waits"):
        torch.empty(3, device=META).nonzero()
