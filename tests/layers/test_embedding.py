"""Embedding multipliers and logits."""

from __future__ import annotations

import torch
from batchinfer_kernels.formats import Precision

from batchinfer.layers.embedding import Embedding, logits
from batchinfer.layers.linear import Linear
from batchinfer.ops.choose import load_backend


def embedding_of(weight: torch.Tensor, multiplier: float) -> Embedding:
    embedding = Embedding(load_backend(), *weight.shape, multiplier, tied=False)
    embedding.pack_weight(weight, Precision(str(weight.dtype).removeprefix("torch.")))
    return embedding


def test_the_multiplier_is_rounded_to_the_weights_dtype_as_gemma_was_trained():
    embedding = embedding_of(torch.ones(2, 1).bfloat16(), 3072**0.5)
    assert embedding(torch.tensor([1])).item() == 55.5  # not 55.43, which bfloat16 would round to 55.5 only at the end
    embedding = embedding_of(torch.full((2, 1), 1.0078125).bfloat16(), 3072**0.5)
    assert embedding(torch.tensor([0])).item() == torch.tensor(1.0078125 * 55.5).bfloat16().item()


def test_embedding_leaves_its_matrix_alone():
    weight = torch.arange(6.0).view(3, 2)
    embedding = embedding_of(weight, 2.0)
    assert embedding(torch.tensor([2, 2, 0])).tolist() == [[8, 10], [8, 10], [0, 2]]
    assert weight.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_logits_are_float32_divided_and_capped():
    hidden, weight = torch.ones(1, 2, dtype=torch.bfloat16), torch.tensor([[1.0, 3.0], [50.0, 50.0]]).bfloat16()
    head = Linear(load_backend(), 2, 2)
    head.pack_weight(weight, Precision.BFLOAT16)
    got = logits(hidden, head, divisor=2.0, soft_cap=10.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, 10 * torch.tanh(torch.tensor([[0.2, 5.0]])))
