"""Structured outputs through the whole engine: a model of random weights prefers anything, and what ends is valid."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jsonschema
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from batchinfer import LLM, Completion, SamplingParams
from batchinfer.errors import BadParameters
from batchinfer.text.pieces import BYTE_ALPHABET

WORDS = ['{"', '":', '": "', '", "', '"}', "true", "false", "null", "city", "name", "12", "3.5", "[1", ", ", "  ", "\n"]

SCHEMAS = [
    {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False},
    {"enum": ["red", "green", 3, None]},
    {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 99}, "minItems": 1, "maxItems": 3},
    {"type": "string", "maxLength": 6},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 50},
    {
        "$defs": {
            "leaf": {
                "type": "object",
                "properties": {"v": {"const": 1}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 4}, "leaf": {"$ref": "#/$defs/leaf"}},
        "required": ["city", "leaf"],
        "additionalProperties": False,
    },
    {
        "anyOf": [
            {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False},
            {"type": "number", "minimum": 0, "maximum": 1},
        ]
    },
]


@pytest.fixture(scope="module")
def random_model(tmp_path_factory) -> Path:
    """Build a llama of random weights over a small byte-level vocabulary; its logits have rows that no token has."""
    folder = tmp_path_factory.mktemp("structured")
    tokens = sorted(BYTE_ALPHABET)
    spelled = [
        "".join(dict(zip(BYTE_ALPHABET.values(), BYTE_ALPHABET, strict=True))[b] for b in w.encode()) for w in WORDS
    ]
    merges: list[tuple[str, str]] = []
    for word in spelled:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    rust = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<|end|>", "<|call|>"])
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=rust.get_vocab_size() + 37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=rust.token_to_id("<|end|>"),
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def llm(random_model: Path) -> LLM:
    return LLM(random_model, max_num_seqs=8, kv_cache_tokens=4096)


def texts(completions: list[Completion]) -> list[str]:
    """Of the answers that ended by themselves."""
    for completion in completions:
        assert completion.error is None, completion.error
    return [output.text for c in completions for output in c.outputs if output.finish_reason == "stop"]


def params_of(schema: object, **more: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 120, "structured_outputs": {"json": schema}, **more})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_that_end_validate_against_their_schema(llm: LLM, temperature: float) -> None:
    prompts = [f"prompt {number}" for number in range(4)]
    ended = 0
    for schema in SCHEMAS:
        answers = texts(llm.generate(prompts, params_of(schema, temperature=temperature, n=3 if temperature else 1)))
        ended += len(answers)
        for answer in answers:
            jsonschema.validate(json.loads(answer), schema)
    assert ended >= (64 if temperature else 16), "too few ended for the test to say much"


def test_all_at_once_under_preemption_equal_one_at_a_time(random_model: Path, llm: LLM) -> None:
    params = [params_of(SCHEMAS[number % len(SCHEMAS)], temperature=number % 2, seed=number) for number in range(32)]
    params[5] = SamplingParams(max_tokens=60, temperature=0)
    prompts = [f"{number} prompt" for number in range(32)]
    tight = LLM(random_model, max_num_seqs=8, kv_cache_tokens=256, block_size=4, max_step_tokens=16)
    together = tight.generate(prompts, params)
    assert tight.stats().preemptions > 0
    for number in range(32):
        alone = llm.generate([prompts[number]], [params[number]])[0]
        assert alone.outputs == together[number].outputs, number
    assert len(texts(together)) >= 16


def test_answers_follow_choice_regex_grammar_and_json_object(llm: LLM) -> None:
    def answer(**given: object) -> list[str]:
        params = SamplingParams(max_tokens=100, temperature=1, n=6, structured_outputs=given)
        return texts(llm.generate(["x", "y"], params))

    assert len(answer(choice=["yes", "no", 'say "maybe"\n', "<|end|>"])) == 12
    assert set(answer(choice=["yes", "no"])) == {"yes", "no"}
    assert all(re.fullmatch(r"[a-f]{2}-\d{1,3}", text) for text in answer(regex=r"[a-f]{2}-[0-9]{1,3}"))
    grammar = 'start: sum\nsum: NUMBER ("+" NUMBER)~1..2\nNUMBER: /[0-9]{1,2}/'
    assert all(re.fullmatch(r"\d{1,2}(\+\d{1,2}){1,2}", text) for text in answer(grammar=grammar))
    assert all(isinstance(json.loads(text), dict) for text in answer(json_object=True))


def test_a_complete_answer_ends_without_another_token(llm: LLM) -> None:
    given = {"choice": ["12true"]}
    for more in ({}, {"ignore_eos": True}, {"min_tokens": 5}):
        output = llm.generate(["x"], SamplingParams(max_tokens=9, structured_outputs=given, **more))[0].outputs[0]
        assert (output.text, output.finish_reason) == ("12true", "stop"), more
        assert len(output.token_ids) == 2, "the tokenizer's own tokens, and no end-of-sequence token"


def test_min_tokens_bad_words_bias_and_stop_strings_still_count(llm: LLM) -> None:
    given = {"regex": "[ab]+"}
    longer = SamplingParams(max_tokens=60, min_tokens=20, n=4, structured_outputs=given)
    outputs = llm.generate(["x"], longer)[0].outputs
    assert all(len(output.text) >= 20 - (output.finish_reason == "stop") for output in outputs)
    for params in ({"bad_words": ("a",)}, {"logit_bias": {97 - 33: -100.0}}):
        banned = SamplingParams(max_tokens=30, temperature=1, structured_outputs=given, **params)
        assert set(llm.generate(["x"], banned)[0].outputs[0].text) <= {"b"}
    stopped = llm.generate(["x"], SamplingParams(max_tokens=60, stop="ba", structured_outputs=given))[0].outputs[0]
    assert stopped.finish_reason == "stop" and "ba" not in stopped.text


def test_logprobs_are_the_models_own(llm: LLM) -> None:
    params = params_of(SCHEMAS[0], temperature=0, logprobs=3)
    found = llm.generate(["x"], params)[0]
    entries = found.outputs[0].logprobs
    assert entries is not None
    for place, entry in enumerate(entries):
        before = found.prompt_token_ids + found.outputs[0].token_ids[:place]
        free = llm.generate([before], SamplingParams(max_tokens=1, temperature=0, logprobs=3))[0].outputs[0].logprobs
        assert free is not None and [i for i, _ in free[0].top] == [i for i, _ in entry.top]
        assert all(math.isclose(a, b, abs_tol=1e-5) for (_, a), (_, b) in zip(free[0].top, entry.top, strict=True))
    assert any(entry.token_id != entry.top[0][0] for entry in entries), "the schema changed nothing"


def test_an_invalid_schema_is_its_rows_error_alone(llm: LLM) -> None:
    params = [params_of(SCHEMAS[0]), params_of({"type": "objec"}), SamplingParams(max_tokens=5), params_of(SCHEMAS[1])]
    completions = llm.generate(["a", "b", "c", "d"], params)
    assert [type(c.error) for c in completions] == [type(None), BadParameters, type(None), type(None)]
    assert "Invalid type: objec" in str(completions[1].error)


@pytest.mark.model
def test_the_quickstart_model_answers_in_json(smollm2_gguf: Path) -> None:
    llm = LLM(smollm2_gguf, max_num_seqs=8)
    schema = {
        "type": "object",
        "properties": {
            "capital": {"type": "string", "maxLength": 30},
            "population": {"type": "integer", "minimum": 0},
            "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
        },
        "required": ["capital", "population", "continent"],
        "additionalProperties": False,
    }
    chats = [[{"role": "user", "content": f"Facts about {name} as JSON."}] for name in ("France", "Japan", "Peru")]
    completions = llm.generate(chats, params_of(schema, temperature=0, max_tokens=80))
    answers = [json.loads(text) for text in texts(completions)]
    assert len(answers) >= 2
    for answer in answers:
        jsonschema.validate(answer, schema)
