"""The ladder of graphs: every step finds a rung that it fits, and none that is needlessly large."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.runner.graph_ladder import SHORT_CONTEXT, GraphLadder, Rung, StepFacts


def fits(step: StepFacts, rung: Rung) -> bool:
    few = rung.has_prompts or (not step.has_prompts and step.max_queries <= rung.max_queries)
    return (
        few and step.tokens <= rung.tokens and step.sequences <= rung.sequences and step.max_length <= rung.max_length
    )


def test_sizes_of_a_usual_engine():
    rungs = GraphLadder(320, 2048, 40_000, 32).rungs
    assert rungs == sorted(rungs, reverse=True) and len(set(rungs)) == len(rungs)
    long = [rung for rung in rungs if rung.max_length == 40_000]
    assert [rung._replace(max_length=SHORT_CONTEXT) for rung in long] == [
        rung for rung in rungs if rung.max_length == SHORT_CONTEXT
    ]
    decodes = sorted(rung.tokens for rung in long if rung.max_queries == 1 and not rung.has_prompts)
    assert decodes == [1, 2, 4, *range(8, 257, 8), 288, 320]
    assert all(rung.sequences == rung.tokens for rung in long if not rung.has_prompts)
    assert sorted(rung.tokens for rung in long if rung.max_queries == 8) == [2, 4, 8, 16, 32]
    assert sorted(rung.tokens for rung in long if rung.has_prompts) == [64, 128, 256, 512, 1024, 2048]
    assert {rung.sequences for rung in long if rung.has_prompts} == {320}


def test_largest_rungs_cover_their_kind():
    ladder = GraphLadder(16, 100, 5000, 32)
    assert ladder.largest == [
        Rung(100, 16, 5000, 1, True),
        Rung(32, 16, 5000, 8, False),
        Rung(16, 16, 5000, 1, False),
    ]


@settings(max_examples=300, deadline=None)
@given(
    seats=st.integers(1, 700),
    step_tokens=st.integers(1, 5000),
    context=st.integers(1, 20_000),
    draft_rows=st.sampled_from([1, 2, 32, 128]),
    data=st.data(),
)
def test_a_step_gets_the_smallest_rung_that_it_fits(seats, step_tokens, context, draft_rows, data):
    ladder = GraphLadder(seats, step_tokens, context, draft_rows)
    rungs = ladder.rungs
    tokens = data.draw(st.integers(1, max(step_tokens, seats)))
    sequences = data.draw(st.integers(-(-tokens // 9) if tokens < 9 * seats else 1, min(tokens, seats)))
    queries = data.draw(st.integers(-(-tokens // sequences), tokens - sequences + 1))
    step = StepFacts(tokens, sequences, data.draw(st.integers(1, context)), queries, data.draw(st.booleans()))
    rung = ladder.find(step)
    assert rung in rungs and fits(step, rung)
    kind = [other for other in rungs if other[3:] == rung[3:]]
    assert not any(fits(step, other) for other in kind if other < rung)
    if not step.has_prompts and queries == 1:  # padding costs less than tiles for drafts
        assert rung.max_queries == 1 and not rung.has_prompts
    if any(fits(step, other) for other in rungs if not other.has_prompts):
        assert not rung.has_prompts


def test_steps_beyond_the_ladder_have_none():
    ladder = GraphLadder(4, 64, 100, 32)
    step = StepFacts(64, 4, 100, 30, True)
    assert ladder.find(step) == Rung(64, 4, 100, 1, True)
    assert ladder.find(step._replace(tokens=65)) is None
    assert ladder.find(step._replace(max_length=101)) is None
    assert ladder.find(step._replace(sequences=5)) is None
