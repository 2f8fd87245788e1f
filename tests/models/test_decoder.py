"""Every family against transformers: equal logits over shuffled blocks, chunks, and chunks mixed with decodes."""

from __future__ import annotations

import pytest
import torch

from batchinfer import ops
from batchinfer.models.precision import WeightPrecision
from batchinfer.models.weights import load_decoder
from batchinfer.ops import Precision
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


@pytest.mark.parametrize("layers", [Precision.FLOAT32, Precision.INT8, Precision.BFLOAT16])
@pytest.mark.parametrize("name", MODELS)
def test_layers_in_one_call_give_what_their_ops_give(name, layers, tmp_path, plain_torch, monkeypatch):
    """Bit for bit, in every form of the weights."""
    if plain_torch:
        pytest.skip("--eager-kernels")
    build(name, tmp_path)
    decoder = load_decoder(tmp_path, WeightPrecision(layers=layers))
    rows, called = _rows(43, 35, 38), []

    def compute(at_once):
        def watched(*arguments):
            called.append(at_once(*arguments))
            return called[-1]

        monkeypatch.setattr(ops, "compute_layers", watched)
        with torch.inference_mode():
            return _compute(Paged(decoder, sequences=3), rows, SPANS)

    got, expected = compute(ops.compute_layers), compute(lambda *arguments: None)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert (None not in called[: len(SPANS)]) if name != "llama-uneven" else not called


def test_layers_are_computed_one_by_one_on_another_backend(tmp_path):
    """What was packed by C++ stays with it; norms and attention are the reference's."""
    model = build("gemma2", tmp_path)
    decoder, rows = load_decoder(tmp_path), _rows(43, 35, 38)
    with ops.keeping_backend("cpu"):
        ops.use_eager("cpu")
        _assert_equal(_compute(Paged(decoder, sequences=3), rows, SPANS), model, rows)


def test_longrope_takes_the_short_factors_where_the_context_is_limited(tmp_path):
    model = build("phi3-longrope", tmp_path)
    rows = _rows(32)
    paged = Paged(load_decoder(tmp_path, max_model_len=32), sequences=1)
    _assert_equal(_compute(paged, rows, [{0: (0, 20)}, {0: (20, 32)}]), model, rows)
