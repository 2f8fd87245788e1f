"""The same requests through the engine alone and over HTTP, in turns: what HTTP costs, its clients included."""

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
_ANSWERS = (16, 48)


def throughput(place: Place) -> str:
    """Raises Failed if over HTTP there are fewer tokens a second than LEAST of the engine's own."""
    place = replace(place, port=free_port())
    engine = LLM(str(place.model), max_num_seqs=CLIENTS)
    rates: dict[str, list[float]] = {"engine": [], "stream": [], "whole": []}
    with started(place, "throughput", place.model, "--set", f"engine.max_num_seqs={CLIENTS}"):
        for number in range(ROUNDS + 1):
            for name, rate in one_round(place, engine, number).items():
                rates[name] += [rate] if number else []  # the first warms up
    middle = {name: statistics.median(found) for name, found in rates.items()}
    shares = {name: middle[name] / middle["engine"] for name in ("stream", "whole")}
    said = f"engine {middle['engine']:.0f} tokens/s; over HTTP " + ", ".join(
        f"{name} {middle[name]:.0f} ({share:.2f})" for name, share in shares.items()
    )
    said += "\n" + "; ".join(f"{name} {' '.join(f'{rate:.0f}' for rate in found)}" for name, found in rates.items())
    if min(shares.values()) < LEAST:
        raise Failed(said)
    return said


def one_round(place: Place, engine: LLM, number: int) -> dict[str, float]:
    """Tokens a second of each way."""
    return {
        "engine": _alone(engine, _requests("A", number)),
        "stream": asyncio.run(_over_http(place, _requests("B", number), True)),
        "whole": asyncio.run(_over_http(place, _requests("C", number), False)),
    }


def _requests(way: str, number: int) -> list[tuple[str, int]]:
    """Prompts and lengths of answers. Each way has a letter of its own: it must not find another's prefixes."""
    chance = random.Random(number)
    texts = [" ".join(chance.choice(WORDS) for _ in range(_PROMPT_WORDS)) for _ in range(REQUESTS)]
    return [(f"{way} {number} {index} {text}", chance.randint(*_ANSWERS)) for index, text in enumerate(texts)]


def _alone(engine: LLM, requests: list[tuple[str, int]]) -> float:
    """Tokens a second."""
    params = [SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True) for _, tokens in requests]
    began_s = time.perf_counter()
    answers = engine.generate([prompt for prompt, _ in requests], params)
    took_s = time.perf_counter() - began_s
    assert all(answer.outputs[0].finish_reason == "length" for answer in answers)
    return sum(tokens for _, tokens in requests) / took_s


async def _over_http(place: Place, requests: list[tuple[str, int]], stream: bool) -> float:
    waiting = iter(requests)
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}

    async def client() -> None:
        for prompt, tokens in waiting:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
            answer = await ask(place, {**body, **options})
            if not answer.done or answer.tokens != tokens:
                raise Failed(f"status {answer.status}, {answer.tokens} tokens of {tokens}")

    began_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return sum(tokens for _, tokens in requests) / (time.perf_counter() - began_s)
