"""Many streaming clients for minutes, a third of which leave at random; then SIGTERM under load.

What a server must not do then: keep sequences, blocks, tasks, connections or memory of clients that have gone, grow
slower, cut a stream off without a word, take new requests while it stops, or stop late.
"""

import asyncio
import contextlib
import dataclasses
import random
import statistics
import time

from tests.clients.place import MODEL, Failed, Place, free_port, started
from tests.clients.raw import WORDS, Answer, ask
from tests.clients.watched import PATH

CLIENTS = 64
LEAVING = 1 / 3
GRACE_S = 8.0
_EXIT_S = 2.0  # beyond the grace: closing connections, the last step, the interpreter's own end
_KV_TOKENS = 8_192  # all of it is in use within seconds, so that memory can be compared, and sequences are preempted
_MARKS = (0.2, 0.6, 1.0)  # of the time, where the process is looked at; from the second on memory has found its level
_LONG = 400  # tokens that take longer than the grace
_BEGUN = 12  # streams of the last ones, when SIGTERM comes; the rest wait, as far as memory goes
_ALONE = 8  # requests without others, before and after
_SLOWER = 1.25  # what the quickest of them may take after, compared with before
_MORE_MIB = 24
_MORE_OBJECTS = 2000


def soak(place: Place) -> str:
    place = dataclasses.replace(place, port=free_port())
    options = ("--set", f"engine.kv_cache_tokens={_KV_TOKENS}", "--set", "engine.max_num_seqs=48")
    with started(place, "soak", place.model, *options, module="tests.clients.watched") as server:
        problems: list[str] = []
        said = [*asyncio.run(_long(place, problems)), *asyncio.run(_ending(place, server, problems))]
    if problems:
        raise Failed("\n".join([*problems[:12], *said]))
    return "\n".join(said)


# -- the long run -----------------------------------------------------------------------------------------------------


async def _long(place: Place, problems: list[str]) -> list[str]:
    await _alone(place, "warm")
    before_s = await _alone(place, "before")
    tally = _Tally()
    marks = [mark * place.minutes for mark in _MARKS]
    levels: list[dict] = []
    began_s = time.monotonic()
    for mark in marks:
        give_up = began_s + mark * 60
        await asyncio.gather(*(_client(place, number, give_up, tally) for number in range(CLIENTS)))
        await asyncio.sleep(1)
        levels.append(place.get(PATH))
    after_s = await _alone(place, "after")
    _, warm, end = levels
    problems += [f"{end[name]} {name} are left" for name in ("sequences", "samples", "reported") if end[name]]
    if end["integrity"]:
        problems.append(f"check_integrity: {end['integrity']}")
    for name, more in (("tasks", 0), ("threads", 0), ("files", 0), ("objects", _MORE_OBJECTS), ("rss_mib", _MORE_MIB)):
        if end[name] > warm[name] + more:
            problems.append(f"{name} grew from {warm[name]} to {end[name]}")
    if after_s > before_s * _SLOWER:
        problems.append(f"a request alone took {before_s:.3f} s before and {after_s:.3f} s after")
    seen = tally.check(problems)
    levels_said = [f"after {minutes:.1f} min: {_level(state)}" for minutes, state in zip(marks, levels, strict=True)]
    return [seen, *levels_said, f"a request of 32 tokens alone: {before_s:.3f} s before, {after_s:.3f} s after"]


def _level(state: dict) -> str:
    names = ("tasks", "threads", "files", "objects")
    return f"{state['rss_mib']:.0f} MiB, " + ", ".join(f"{state[name]} {name}" for name in names)


class _Tally:
    """Counts of what the clients saw."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.left = 0

    def check(self, problems: list[str]) -> str:
        wrong = [x for x in self.answers if x.status != 200 or not x.done or x.reason not in ("length", "stop")]
        problems += [f"status {x.status}, reason {x.reason}, done {x.done}: {x.events[-1:]}" for x in wrong[:5]]
        if not self.left or not self.answers:
            problems.append(f"{len(self.answers)} answers, {self.left} clients left: too short")
            return ""
        first = [x.first_s - x.began_s for x in self.answers if x.first_s is not None]
        third = max(1, len(first) // 3)
        early, late = statistics.median(first[:third]), statistics.median(first[-third:])
        return (
            f"{len(self.answers)} answers, {self.left} clients left before theirs; "
            f"first token after {early:.2f} s in the first third, {late:.2f} s in the last"
        )


async def _client(place: Place, number: int, give_up_s: float, tally: _Tally) -> None:
    chance = random.Random(f"{number} {give_up_s}")
    while time.monotonic() < give_up_s:
        answer = Answer(time.monotonic())
        asked = asyncio.ensure_future(ask(place, _body(chance, chance.randint(4, 64)), answer))
        if chance.random() < LEAVING:
            # in the queue, in the prompt, or somewhere in the answer
            await asyncio.wait((asked,), timeout=chance.uniform(0, 6))
            if not asked.done():
                asked.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asked
                tally.left += 1
                continue
        await asked
        tally.answers.append(answer)


def _body(chance: random.Random, max_tokens: int) -> dict:
    shared = f"Story {chance.randint(1, 5)}. " + "Once there was a river. " * 4  # found in the prefix cache
    prompt = shared + " ".join(chance.choice(WORDS) for _ in range(chance.randint(1, 60)))
    extra = {"stop": ["\n\n"]} if chance.random() < 0.3 else {"ignore_eos": True}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.8, **options, **extra}


async def _alone(place: Place, name: str) -> float:
    """Return the seconds of the quickest of a few requests that run alone."""
    took = []
    for number in range(_ALONE):
        chance = random.Random(f"{name} {number}")
        answer = await ask(place, {**_body(chance, 32), "stop": None, "ignore_eos": True, "temperature": 0})
        if answer.reason != "length" or answer.tokens != 32:
            raise Failed(f"a request alone ended with {answer.reason} after {answer.tokens} tokens")
        took.append(answer.end_s - answer.began_s)
    return min(took)


# -- the end ----------------------------------------------------------------------------------------------------------


async def _ending(place: Place, server, problems: list[str]) -> list[str]:
    """Send SIGTERM while streams are open: some finish within the grace period, some are too long."""
    chance = random.Random(1)
    answers = [Answer(time.monotonic()) for _ in range(CLIENTS)]
    bodies = [{**_body(chance, 8 if number % 2 else _LONG), "ignore_eos": True} for number in range(CLIENTS)]
    for body in bodies:
        body.pop("stop", None)
    asked = [asyncio.ensure_future(ask(place, *both)) for both in zip(bodies, answers, strict=True)]
    while sum(answer.first_s is not None for answer in answers) < _BEGUN:
        await asyncio.sleep(0.02)
    began_s = time.monotonic()
    server.terminate()
    refused = await _new_ones(place, began_s)
    code = await asyncio.to_thread(server.wait, 60)
    took_s = time.monotonic() - began_s
    await asyncio.wait(asked, timeout=5)
    reasons = [answer.reason if answer.done else None for answer in answers]
    problems += [f"a stream broke off after {answer.events[-1:]}" for answer in answers if not answer.done]
    if code != 0 or took_s > GRACE_S + _EXIT_S:
        problems.append(f"exit code {code} after {took_s:.1f} s")
    if set(refused) != {503}:
        problems.append(f"new requests got {sorted(set(refused))}")
    counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in ("length", "error"))
    return [f"SIGTERM: streams ended with {counts}; {len(refused)} new ones got 503; exit {code} after {took_s:.1f} s"]


async def _new_ones(place: Place, began_s: float) -> list[int]:
    """Return the statuses of requests sent while the server stops, until it accepts no connection."""
    found: list[int] = []
    await asyncio.sleep(0.2)  # a signal is handled between two events of the loop
    while time.monotonic() < began_s + GRACE_S - 2:
        try:
            found.append((await ask(place, {"model": MODEL, "prompt": "x", "max_tokens": 1})).status)
        except OSError:
            break
        await asyncio.sleep(0.25)
    return found
