"""Scores of texts: splits and windows as lm-evaluation-harness makes them, values as a model's log-softmax has them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from batchinfer import LLM
from batchinfer.errors import InvalidInput, TooLong
from batchinfer.pipeline.scoring import best_choice, pair, windows
from batchinfer.request import Score
from batchinfer.spec import FakeSpec
from tests.models.tiny import build


def fake_llm(**options) -> LLM:
    return LLM("fake", fake=FakeSpec(answer_tokens=(3, 30)), **options)


def harness_windows(token_list, prefix_token, max_seq_len):
    """lm-eval's get_rolling_token_windows with context_len 1, through make_disjoint_window: (context, scored)."""
    first = min(max_seq_len, len(token_list))
    found = [([prefix_token, *token_list[: first - 1]], token_list[:first])]
    predicted = first
    while predicted < len(token_list):
        count = min(len(token_list) - predicted, max_seq_len)
        end = predicted + count
        found.append((token_list[end - max_seq_len - 1 : end - 1], token_list[end - count : end]))
        predicted += count
    return [(context[: len(context) - (len(scored) - 1)], scored) for context, scored in found]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 40, 41])
@pytest.mark.parametrize("context", [1, 2, 8, 100])
def test_windows_are_those_of_the_harness(length, context):
    ids = list(range(100, 100 + length))
    ours = [(prompt[:first], prompt[first:]) for prompt, first in windows(ids, 7, context)]
    assert ours == harness_windows(ids, 7, context)
    assert [token for _, scored in ours for token in scored] == ids


def test_spaces_move_to_the_continuation():
    assert pair("a b  ", "c") == ("a b", "  c")
    assert pair("a", " c") == ("a", " c") and pair("  ", "c") == ("", "  c")


def test_score_choose_and_rolling_agree():
    llm = fake_llm(max_num_seqs=4)
    context = "What is the capital of France? It is a long question, so that blocks are shared. Answer: "
    choices = ["Paris", "Lyon", "a village"]
    chosen = llm.choose([(context, choices)] * 2)
    assert [completion.index for completion in chosen] == [0, 1] and chosen[0].scores == chosen[1].scores
    single = llm.score([(context, choice) for choice in choices])
    assert [completion.scores[0] for completion in single] == chosen[0].scores
    assert chosen[0].choice == best_choice(chosen[0].scores, "sum")
    for score, choice in zip(chosen[0].scores, choices, strict=True):
        assert bytes(score.token_ids).decode() == " " + choice
        assert score.logprob == sum(score.token_logprobs) and len(score.token_logprobs) == len(choice) + 1
    assert chosen[0].prompt_token_ids == list(context.rstrip().encode()) and chosen[0].outputs == []
    assert llm.stats().prompt_tokens_reused > 2 * 64
    whole = llm.rolling([context + "Paris"])[0].scores[0]
    assert whole == replace(llm.score([("", context + "Paris")])[0].scores[0], text=None)


def test_token_ids_and_empty_contexts():
    llm = fake_llm()
    by_text = llm.score([("ab", "cd"), ("", "cd")])
    by_ids = llm.score([([97, 98], [99, 100]), ([97, 98], "cd"), ([256], [99, 100])])
    logprobs = [completion.scores[0].token_logprobs for completion in by_text + by_ids]
    assert logprobs[0] == logprobs[2] == logprobs[3] and logprobs[1] == logprobs[4]
    assert [completion.scores[0].text for completion in by_ids] == [None, "cd", None] and by_text[
        1
    ].prompt_token_ids == [256]


def test_what_cannot_be_scored_is_an_error_of_its_own():
    llm = fake_llm(max_model_len=20, kv_cache_tokens=32, block_size=4)
    found = llm.choose([("ab", ["c", "x" * 30]), ("ab", []), ("ab", ["c", ""]), ("ab", ["c" * 19]), ("a", [[999]])])
    assert [type(completion.error) for completion in found] == [
        TooLong,
        InvalidInput,
        InvalidInput,
        type(None),
        InvalidInput,
    ]
    assert len(found[3].scores[0].token_ids) == 19, "the last token needs no place in the context"
    assert isinstance(llm.rolling([""])[0].error, InvalidInput)
    assert isinstance(llm.embed(["x" * 21])[0].error, TooLong) and llm.embed(["x" * 20])[0].error is None


def test_long_texts_roll():
    llm = fake_llm(max_model_len=16, kv_cache_tokens=64)
    text = "a text of more than sixteen bytes, and than thirty-two"
    score = llm.rolling([text])[0].scores[0]
    assert bytes(score.token_ids).decode() == text and len(score.token_logprobs) == len(text)


def test_the_best_choice_depends_on_the_measure():
    scores = [
        Score(-4.0, False, [1, 2, 3, 4], [], "abcd"),
        Score(-3.0, False, [1], [], "x"),
        Score(-3.5, True, [1, 2], [], "y" * 40),
    ]
    assert [best_choice(scores, by) for by in ("sum", "tokens", "characters")] == [1, 0, 2]
    found = fake_llm().choose([("ab", ["c", "de"]), ("ab", [[99]])], by="characters")
    assert found[0].choice == best_choice(found[0].scores, "characters") and found[0].scores[1].text == "de"
    assert isinstance(found[1].error, InvalidInput)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("llama")
    reference = build("llama", folder)
    letters = {chr(97 + number): number + 10 for number in range(26)}
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "_": 3} | letters, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return folder, reference


def test_values_are_the_models(tiny):
    folder, reference = tiny
    llm = LLM(str(folder), max_model_len=24, kv_cache_tokens=96, block_size=4, max_step_tokens=16, max_num_seqs=4)

    def expected(ids, first):
        with torch.inference_mode():
            rows = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1)
        values = [float(rows[place - 1, ids[place]]) for place in range(first, len(ids))]
        greedy = all(int(rows[place - 1].argmax()) == ids[place] for place in range(first, len(ids)))
        return values, greedy

    def ids_of(text):
        return [ord(letter) - 87 for letter in text]

    pairs = [("hello", "world"), ("abc", "d"), ("zyx", "wvutsrq")]
    for completion, (context, continuation) in zip(llm.score(pairs), pairs, strict=True):
        values, greedy = expected(ids_of(context + continuation), len(context))
        assert completion.scores[0].token_logprobs == pytest.approx(values, abs=1e-4)
        assert completion.scores[0].is_greedy == greedy
        assert completion.scores[0].logprob == pytest.approx(sum(values), abs=1e-3)
    with torch.inference_mode():
        likely = int(reference(torch.tensor([ids_of("hello")])).logits[0, -1].argmax())
    assert llm.score([(ids_of("hello"), [likely])])[0].scores[0].is_greedy
    text = "thequickbrownfoxjumpsoverthelazydogandrunsaway"
    values = [value for ids, first in windows(ids_of(text), 1, 24) for value in expected(ids, first)[0]]
    assert llm.rolling([text])[0].scores[0].token_logprobs == pytest.approx(values, abs=1e-4)
    with torch.inference_mode():
        states = reference(torch.tensor([ids_of("embedme")]), output_hidden_states=True).hidden_states[-1][0].double()
    for pooling, state in (("mean", states.mean(0)), ("last", states[-1]), ("cls", states[0])):
        plain = llm.embed(["embedme"], pooling, normalize=False)[0].embedding
        assert plain == pytest.approx(state.tolist(), rel=1e-4, abs=1e-4)
        unit = llm.embed(["embedme"], pooling)[0].embedding
        assert math.hypot(*unit) == pytest.approx(1) and unit == pytest.approx(
            (state / state.norm()).tolist(), abs=1e-4
        )
