"""Cost of HTTP, its clients included: the same requests on the engine alone and over HTTP, in turns."""

import asyncio
import random
import statistics
import time
from dataclasses import replace

from batchinfer import LLM, SamplingParams
from tests.clients.place import MODEL, Failed, Place, free_port, started
from tests.clients.raw import WORDS, ask

CLIENTS = 64
LEAST = 0.9
ROUNDS = 3
REQUESTS = 128  # of a round
_PROMPT_WORDS = 64
_TOKENS = 32  # of every answer: of unequal ones the engine alone runs the longest first, as no endpoint can


def throughput(place: Place) -> str:
    """Measure both ways. Raises Failed if HTTP reaches less than LEAST of the engine's tokens per second."""
    place = replace(place, port=free_port())
    engine = LLM(str(place.model), max_num_seqs=CLIENTS)
    rates: dict[str, list[float]] = {"engine": [], "stream": [], "whole": []}
    with started(place, "throughput", place.model, "--set", f"engine.max_num_seqs={CLIENTS}"):
        for number in range(ROUNDS + 1):
            for name, rate in one_round(place, engine, number).items():
                rates[name] += [rate] if number else []  # the first warms up
    # of each round, whose runs follow one another: the machine may be faster in another
    rounds = {
        name: [rate / alone for rate, alone in zip(rates[name], rates["engine"], strict=True)]
        for name in ("stream", "whole")
    }
    shares = {name: statistics.median(found) for name, found in rounds.items()}
    said = "over HTTP, of the engine's own: " + ", ".join(f"{name} {share:.2f}" for name, share in shares.items())
    said += "\n" + "; ".join(f"{name} {' '.join(f'{rate:.0f}' for rate in found)}" for name, found in rates.items())
    said += " tokens/s"
    if min(shares.values()) < LEAST:
        raise Failed(said)
    return said


def one_round(place: Place, engine: LLM, number: int) -> dict[str, float]:
    """Return tokens per second of each way."""
    return {
        "engine": _alone(engine, _prompts("A", number)),
        "stream": asyncio.run(_over_http(place, _prompts("B", number), True)),
        "whole": asyncio.run(_over_http(place, _prompts("C", number), False)),
    }


def _prompts(way: str, number: int) -> list[str]:
    """Return the prompts; each way has its own first letter, so that it does not find another's prefixes."""
    chance = random.Random(number)
    texts = [" ".join(chance.choice(WORDS) for _ in range(_PROMPT_WORDS)) for _ in range(REQUESTS)]
    return [f"{way} {number} {index} {text}" for index, text in enumerate(texts)]


def _alone(engine: LLM, prompts: list[str]) -> float:
    """Return tokens per second."""
    params = SamplingParams(temperature=0, max_tokens=_TOKENS, ignore_eos=True)
    began_s = time.perf_counter()
    answers = engine.generate(prompts, params)
    took_s = time.perf_counter() - began_s
    assert all(answer.outputs[0].finish_reason == "length" for answer in answers)
    return len(prompts) * _TOKENS / took_s


async def _over_http(place: Place, prompts: list[str], stream: bool) -> float:
    waiting = iter(prompts)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    same = {"model": MODEL, "max_tokens": _TOKENS, "temperature": 0, "ignore_eos": True, **options}

    async def client() -> None:
        for prompt in waiting:
            answer = await ask(place, {**same, "prompt": prompt})
            if not answer.done or answer.tokens != _TOKENS:
                raise Failed(f"status {answer.status}, {answer.tokens} tokens of {_TOKENS}")

    began_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return len(prompts) * _TOKENS / (time.perf_counter() - began_s)
