"""Weights on their way to a device: the same through a staging ring, and never twice in the device's memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batchinfer_kernels.eager import EagerBackend
from batchinfer_kernels.formats import Precision
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batchinfer.models.precision import WeightPrecision
from batchinfer.models.weights import load_decoder
from batchinfer.ops.pretend import PretendStreams
from batchinfer.ops.resources import HOST
from batchinfer.ops.staging import StagingRing
from tests.models.gguf_files import write_model
from tests.models.tiny import build

META = torch.device("meta")
PRECISIONS = [Precision.BFLOAT16, Precision.FLOAT16, Precision.FLOAT32]


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that live on a device: now, and at most so far."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.peak = 0
        self._storages = {}

    @property
    def live(self):
        self._storages = {key: found for key, found in self._storages.items() if not found[0].expired()}
        return sum(num_bytes for _, num_bytes in self._storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device == self.device:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.live)
        return found


def _narrow(device):
    """Return the eager backend of a device, with activations in the dtype of the matrices."""
    backend = EagerBackend(device)
    backend.capabilities = replace(backend.capabilities, dtype_of_activations=True)
    return backend


def _model(name, kind, tmp_path):
    model = build(name, tmp_path)
    if kind == "gguf":
        write_model(tmp_path / "m.gguf", name, model)
        return tmp_path / "m.gguf"
    return tmp_path


def _numbers(decoder):
    """Return every weight of a decoder: its parameters, and the values of its matrices."""
    matrices = [part.matrix.values_OI for part in decoder.modules() if hasattr(part, "pack_weight")]
    return [*decoder.parameters(), *matrices]


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_ring_reads_what_the_host_reads(kind, precision, tmp_path):
    path, wanted = _model("llama", kind, tmp_path), WeightPrecision.of_all(precision)
    streams = PretendStreams()
    staged = load_decoder(path, wanted, backend=_narrow(HOST), staging=StagingRing(streams, HOST, 1000))
    streams.synchronize()
    for mine, theirs in zip(_numbers(staged), _numbers(load_decoder(path, wanted, backend=_narrow(HOST))), strict=True):
        assert mine.dtype == precision.dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_no_weight_is_twice_in_the_memory_of_a_device(name, kind, precision, tmp_path):
    path = _model(name, kind, tmp_path)
    staging = StagingRing(PretendStreams(), HOST, 1000)
    with LiveMemory(META) as memory:
        decoder = load_decoder(path, WeightPrecision.of_all(precision), backend=_narrow(META), staging=staging)
    weights = sum(one.nbytes for one in _numbers(decoder))
    frequencies = sum(rotary.frequencies_R.nbytes for rotary in decoder.rotaries)
    assert weights > 0 and all(one.device == META for one in _numbers(decoder))
    assert memory.live == weights + frequencies
    assert memory.peak == memory.live


def test_the_count_sees_a_copy_that_is_freed_again():
    with LiveMemory(META) as memory:
        kept = torch.empty(100, dtype=torch.uint8, device=META)
        view = kept[10:]
        kept.float()
        del kept
    assert (memory.live, memory.peak) == (100, 500)
    del view
    assert memory.live == 0
