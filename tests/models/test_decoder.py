"""Every family against transformers: equal logits over shuffled blocks, chunks, and chunks mixed with decodes."""

from __future__ import annotations

import pytest
import torch
from batchinfer_kernels import cpu
from batchinfer_kernels.cpu.fused_layers import FusedLayers
from batchinfer_kernels.formats import Precision

from batchinfer.models.precision import WeightPrecision
from batchinfer.models.weights import load_decoder
from tests.models.tiny import MODELS, SIZES, Paged, build

SPANS = (
    {0: (0, 17)},
    {0: (17, 31), 1: (0, 24)},
    {1: (24, 25), 0: (31, 40), 2: (0, 35)},
    {0: (40, 41), 1: (25, 26), 2: (35, 36)},
    {2: (36, 37), 0: (41, 43), 1: (26, 35)},
    {2: (37, 38)},
)
"""Which tokens of which sequence each step computes: whole prompts, chunks, decodes, and all of them mixed."""


def _rows(*lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, SIZES["vocab_size"], (n,), generator=generator).tolist() for n in lengths]


def _compute(paged, rows, spans):
    got = [[] for _ in rows]
    for step in spans:
        work = {sequence: rows[sequence][a:b] for sequence, (a, b) in step.items()}
        parts = paged.step(work).split([len(tokens) for tokens in work.values()])
        for sequence, part in zip(work, parts, strict=True):
            got[sequence].append(part)
    return [torch.cat(parts) for parts in got]


@torch.inference_mode()
def _assert_equal(got, model, rows):
    """Near to what transformers computes in float64, and as near as its own float32 is, but for a factor."""
    narrow = [model(torch.tensor([row])).logits[0] for row in rows]
    model.double()
    wide = [model(torch.tensor([row])).logits[0] for row in rows]
    model.float()
    noise = max(_farthest(theirs, exact) for theirs, exact in zip(narrow, wide, strict=True))
    for mine, exact in zip(got, wide, strict=True):
        assert _farthest(mine, exact) < min(4 * noise, 1e-4 * max(1.0, exact.std().item()))
        assert exact.std() > 0.01  # not all alike: the comparison means something


def _farthest(logits, others):
    return (logits - others).abs().max().item()


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name, tmp_path):
    model = build(name, tmp_path)
    rows = _rows(43, 35, 38)  # all beyond every window and every original context
    paged = Paged(load_decoder(tmp_path), sequences=3)
    _assert_equal(_compute(paged, rows, SPANS), model, rows)


@pytest.mark.skipif(cpu.problem() is not None, reason=str(cpu.problem()))
@pytest.mark.parametrize("layers", [Precision.FLOAT32, Precision.INT8, Precision.BFLOAT16])
@pytest.mark.parametrize("name", MODELS)
def test_fused_layers_give_what_their_ops_give(name, layers, tmp_path):
    """Bit for bit, in every form of the weights; a stack with panels that do not come out even stays op by op."""
    build(name, tmp_path)
    fallbacks = []
    decoder = load_decoder(tmp_path, WeightPrecision(layers=layers), backend=cpu.CPUBackend(fallbacks.append))
    rows = _rows(43, 35, 38)
    with torch.inference_mode():
        got = _compute(Paged(decoder, sequences=3), rows, SPANS)
        assert [one.op for one in fallbacks] == (["layer_stack"] if name == "llama-uneven" else [])
        if isinstance(decoder._stack, FusedLayers):
            decoder._stack = decoder._stack._op_by_op
        expected = _compute(Paged(decoder, sequences=3), rows, SPANS)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_longrope_takes_the_short_factors_where_the_context_is_limited(tmp_path):
    model = build("phi3-longrope", tmp_path)
    rows = _rows(32)
    paged = Paged(load_decoder(tmp_path, max_model_len=32), sequences=1)
    _assert_equal(_compute(paged, rows, [{0: (0, 20)}, {0: (20, 32)}]), model, rows)
