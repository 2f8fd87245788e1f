"""Requests and the model of host benchmarks: random prompts, fake answers of random lengths, no arithmetic."""

from __future__ import annotations

from random import Random

from batchinfer.engine.blocks import BlockPool
from batchinfer.engine.fake import FakeAnswer
from batchinfer.engine.scheduler import Scheduler
from batchinfer.models.config import ModelConfig, parse_config
from batchinfer.request import Request, SamplingParams, StopCheck

VOCAB = 32  # so small that finding the largest logit is no work
BLOCK_SIZE = 16
CONTEXT = 192
_PROMPT_TOKENS = 60
_EOS = 2
_STOP_IDS = frozenset({_EOS})  # one object, as the rows of a job have it

ANSWER = FakeAnswer(32, 128, [token for token in range(VOCAB) if token != _EOS], _EOS)
"""Shape of all answers."""


def make_scheduler(sequences: int) -> Scheduler:
    """Return a scheduler with a seat for each sequence, and blocks and step tokens to spare."""
    pool = BlockPool(2 * sequences * CONTEXT // BLOCK_SIZE, BLOCK_SIZE)
    return Scheduler(pool, sequences, 2 * sequences + 4096, max_draft_rows=0)


def queued_requests(sequences: int) -> int:
    """Return the requests that wait before each step, so that all seats stay taken."""
    return max(64, sequences // 4)


def make_request(number: int, rng: Random, params: SamplingParams, check: StopCheck | None = None) -> Request:
    """Return a request with a random prompt, whose answer may fill the context."""
    prompt = rng.choices(range(VOCAB), k=_PROMPT_TOKENS)
    return Request(number, prompt, params, CONTEXT - _PROMPT_TOKENS, stop_ids=_STOP_IDS, stop_check=check)


def smallest_config() -> ModelConfig:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 2,
        "intermediate_size": 2,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
    }
    return parse_config(values, "the smallest model")
