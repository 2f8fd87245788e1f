"""The draw against a naive single-row implementation, exact distributions, and itself in other batches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from batchinfer.runner.sample_tokens import Filters, argmax, draw, largest, log_sum_exp, ranked


def filters(count, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, uniform=0.5):
    """Return filters for `count` rows; every argument is one value for all rows, or one per row."""
    kinds = (np.float32, np.int64, np.float64, np.float64, np.float64)
    values = (temperature, top_k, top_p, min_p, uniform)
    return Filters(*(np.array(np.broadcast_to(v, count), dtype=k) for v, k in zip(values, kinds, strict=True)))


def take(one: Filters, rows) -> Filters:
    return Filters(*(values[rows] for values in one))


def all_rows(logits):
    return np.arange(len(logits))


def kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Return the exact distribution of a row in float64, one filter after another."""
    scaled = (logits - logits.max()).astype(np.float64) / np.float32(temperature)
    mass = np.exp(scaled)
    keep = mass >= min_p * mass.max()
    if 0 < top_k < len(mass):
        keep &= mass >= np.sort(mass)[-top_k]
    mass = np.where(keep, mass, 0)
    mass /= mass.sum()
    if top_p < 1:
        ascending = np.sort(mass)
        above = mass.sum() - ascending.cumsum()[np.searchsorted(ascending, mass, side="right") - 1]
        mass = np.where(above < top_p, mass, 0)
    return mass / mass.sum()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Return the statistic, and the value that it exceeds once in about a million (Wilson-Hilferty)."""
    expected = expected * counts.sum()
    assert counts[expected == 0].sum() == 0, "a token of no probability was drawn"
    order = np.argsort(expected)
    small = expected[order].cumsum() < 50  # rare tokens together are one class
    groups = np.where(small, 0, np.arange(len(order)) + 1)
    observed = np.bincount(groups, weights=counts[order])
    expected = np.bincount(groups, weights=expected[order])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = max(len(expected) - 1, 1)
    limit = freedom * (1 - 2 / (9 * freedom) + 4.9 * math.sqrt(2 / (9 * freedom))) ** 3
    return float(((observed - expected) ** 2 / expected).sum()), limit


CASES = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 20},
    "top_k 2": {"top_k": 2},
    "wide top_k": {"top_k": 700},
    "top_p": {"top_p": 0.8},
    "tiny top_p": {"top_p": 1e-9},
    "wide top_p": {"top_p": 0.99, "temperature": 2.0},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "wide all": {"temperature": 1.5, "top_k": 600, "top_p": 0.95, "min_p": 0.001},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("vocab", [7, 300, 3000])
def test_draws_follow_the_exact_distribution(case, vocab):
    generator = np.random.default_rng(vocab)
    row = (generator.standard_normal(vocab) * 2).astype(np.float32)
    draws = 20_000 if vocab == 300 else 6000
    # stratified uniforms would hide nothing of the filters, but would make the statistic too good: use random ones
    uniform = generator.random(draws)
    logits = torch.from_numpy(row).expand(draws, -1)
    tokens = draw(logits, all_rows(logits), filters(draws, uniform=uniform, **CASES[case])).numpy()
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **CASES[case]}
    statistic, limit = chi_square(np.bincount(tokens, minlength=vocab), kept(row, **values))
    assert statistic < limit


@pytest.mark.parametrize("vocab", [5, 129, 1000, 4099])
def test_each_draw_is_the_inverse_of_the_cumulative_distribution(vocab):
    """Row by row with random filters: the drawn token is where the naive running sum passes the uniform number."""
    generator = np.random.default_rng(vocab)
    rows = 150
    logits = (generator.standard_normal((rows, vocab)) * generator.uniform(0.1, 8, (rows, 1))).astype(np.float32)
    some = filters(
        rows,
        temperature=generator.uniform(0.2, 3, rows),
        top_k=generator.choice([0, 1, 2, 5, 40, 100, 300, 2000], rows),
        top_p=generator.choice([1.0, 0.999, 0.9, 0.5, 0.01], rows),
        min_p=generator.choice([0.0, 0.0, 0.01, 0.3, 1.0], rows),
        uniform=generator.random(rows),
    )
    tokens = draw(torch.from_numpy(logits), all_rows(logits), some).numpy()
    for row in range(rows):
        sums = kept(logits[row], **naive(some, row)).cumsum()
        low = sums[tokens[row] - 1] if tokens[row] else 0.0
        assert low - 1e-5 <= some.uniform_R[row] <= sums[tokens[row]] + 1e-5, (row, naive(some, row))


def naive(some: Filters, row: int) -> dict[str, float]:
    return {
        "temperature": float(some.temperature_R[row]),
        "top_k": int(some.top_k_R[row]),
        "top_p": float(some.top_p_R[row]),
        "min_p": float(some.min_p_R[row]),
    }


def mixed_batch(vocab=5003, rows=96):
    generator = np.random.default_rng(0)
    logits = (generator.standard_normal((rows, vocab)) * generator.uniform(0.1, 6, (rows, 1))).astype(np.float32)
    # ties everywhere in a third of the rows, as 16-bit logits have them
    logits[::3] = torch.from_numpy(logits[::3]).bfloat16().float().numpy()
    logits[1::6] = logits[1::6].round()
    some = filters(
        rows,
        temperature=generator.uniform(0.2, 3, rows),
        top_k=generator.choice([0, 0, 2, 40, 150, 900], rows),
        top_p=generator.choice([1.0, 0.95, 0.5], rows),
        min_p=generator.choice([0.0, 0.0, 0.02], rows),
        uniform=generator.random(rows),
    )
    return torch.from_numpy(logits), some


def test_a_row_draws_the_same_token_alone_and_in_any_batch():
    logits, some = mixed_batch()
    whole = draw(logits, all_rows(logits), some)
    alone = [int(draw(logits[[row]], np.array([0]), take(some, [row]))) for row in range(len(logits))]
    assert alone == whole.tolist()
    generator = np.random.default_rng(1)
    for size in (2, 17, 96):
        rows = generator.permutation(len(logits))[:size]
        assert draw(logits[rows], np.arange(size), take(some, rows)).tolist() == whole[rows].tolist()
        assert draw(logits, rows, take(some, rows)).tolist() == whole[rows].tolist()


def test_threads_do_not_change_a_draw():
    logits, some = mixed_batch(vocab=40_000, rows=12)
    threads = torch.get_num_threads()
    answers = []
    for count in (1, 2):
        torch.set_num_threads(count)
        tokens = [int(draw(logits[[row]], np.array([0]), take(some, [row]))) for row in range(len(logits))]
        answers.append((tokens, draw(logits, all_rows(logits), some).tolist(), log_sum_exp(logits, logits.amax(1))))
    torch.set_num_threads(threads)
    assert answers[0][0] == answers[0][1] == answers[1][0] == answers[1][1]
    assert torch.equal(answers[0][2], answers[1][2])
    assert torch.equal(torch.cat([log_sum_exp(row[None], row.amax()[None]) for row in logits]), answers[0][2])


def test_candidates_and_the_whole_vocabulary_draw_the_same(monkeypatch):
    """The short way and the long way must agree bit for bit, or a row's token would depend on its neighbours."""
    logits, some = mixed_batch()
    short = draw(logits, all_rows(logits), some)
    monkeypatch.setattr("batchinfer.runner.sample_tokens._CANDIDATES", ())
    assert torch.equal(draw(logits, all_rows(logits), some), short)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("case", CASES)
def test_extreme_uniforms_draw_tokens_that_the_filters_keep(case, uniform):
    generator = np.random.default_rng(3)
    row = generator.standard_normal(2000).astype(np.float32)
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **CASES[case]}
    inside = np.nonzero(kept(row, **values))[0]
    token = int(draw(torch.from_numpy(row)[None], np.array([0]), filters(1, uniform=uniform, **CASES[case])))
    assert token == (inside[0] if uniform == 0.0 else inside[-1])


def test_the_largest_uniform_draws_the_last_token_of_a_flat_row():
    """The product with a sum beyond 2^53 rounds up to the sum itself."""
    assert draw(torch.zeros(1, 50_000), np.array([0]), filters(1, uniform=1 - 2.0**-53)).tolist() == [49_999]


def test_ties_with_the_last_one_kept_are_kept():
    logits = torch.zeros(3000, 500)
    uniform = np.random.default_rng(5).random(3000)
    for case in ({"top_k": 3}, {"top_p": 0.1}, {"min_p": 1.0}):
        tokens = draw(logits, all_rows(logits), filters(3000, uniform=uniform, **case))
        assert len(tokens.unique()) > 450
    # what top_p is a share of is all that top_k keeps, not only as many of the equals as were looked at
    logits[:, 1:] -= 3
    assert len(draw(logits, all_rows(logits), filters(3000, top_k=4, top_p=0.2, uniform=uniform)).unique()) > 450


def test_masked_and_extreme_logits_draw_allowed_tokens():
    row = torch.full((1, 1000), -math.inf)
    row[0, 7], row[0, 900] = 3e38, -3e38
    for case in ({}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 1e-5}, {"temperature": 1e30, "top_k": 1}):
        assert draw(row, np.array([0]), filters(1, uniform=0.3, **case)).tolist() == [7]


@pytest.mark.parametrize("vocab", [1, 5, 1024, 1500, 4096, 4097])
def test_argmax_and_largest_agree_with_torch(vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(40, vocab, generator=generator)
    logits[10:] = logits[10:].bfloat16().float()
    logits[39] = 0.0
    for row in range(10):  # the largest at two places
        logits[row, torch.randint(0, vocab, (2,), generator=generator)] = 9.0
    values, ids = argmax(logits)
    assert torch.equal(ids, logits.argmax(1)) and torch.equal(values, logits.amax(1))
    for count in {1, min(20, vocab), min(64, vocab), vocab}:
        values, ids = largest(logits, count)
        assert torch.equal(values, logits.topk(count).values)
        assert torch.equal(logits.gather(1, ids), values)
        assert all(len(set(row)) == count for row in ids.tolist())
        whole = logits.sort(dim=1, descending=True, stable=True)
        values, ids = ranked(logits, count)
        assert torch.equal(values, whole.values[:, :count]) and torch.equal(ids, whole.indices[:, :count])


@pytest.mark.parametrize("place", [0, 700, 1023, 1024, 1400])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_argmax_finds_values_that_are_not_finite(place, bad):
    logits = torch.randn(3, 1500)
    logits[1, place] = bad
    assert argmax(logits)[0].isfinite().tolist() == [True, False, True]


def test_log_sum_exp_is_exact_enough():
    for scale in (0.0, 1.0, 30.0):
        logits = torch.randn(9, 49_152) * scale
        exact = logits.double().logsumexp(1)
        assert (log_sum_exp(logits, logits.amax(1)) - exact).abs().max() < 2e-6
