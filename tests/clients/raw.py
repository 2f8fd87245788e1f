"""Light client for completions, streamed or whole, that leaves most of two cores to the server."""

import asyncio
import json
import time
from dataclasses import dataclass, field

from tests.clients.place import KEY, Place

# of prompts that nobody has to make sense of
WORDS = ("river", "stone", "amber", "seven", "quiet", "engine", "harvest", "copper", "window", "ninety", "forest")


@dataclass
class Answer:
    """What came: the JSON values of all events, or of the one body. Times are of time.monotonic.

    `done`: the stream ended with [DONE], or the body was complete.
    """

    began_s: float
    status: int = 0
    events: list[dict] = field(default_factory=list)
    done: bool = False
    first_s: float | None = None
    end_s: float = 0.0

    @property
    def reason(self):
        """Return the finish reason, "error" for an error event, or None if the answer broke off."""
        found = [choice["finish_reason"] for event in self.events for choice in event.get("choices", ())]
        return "error" if any("error" in event for event in self.events) else next(filter(None, found), None)

    @property
    def tokens(self) -> int:
        used = [event["usage"]["completion_tokens"] for event in self.events if event.get("usage")]
        return used[-1] if used else 0


async def ask(place: Place, body: dict, answer: Answer | None = None) -> Answer:
    """Request one completion on its own connection, which cancelling closes; fill `answer` as data arrives."""
    answer = answer or Answer(time.monotonic())
    reader, writer = await asyncio.open_connection("127.0.0.1", place.port, limit=1 << 24)
    try:
        writer.write(_request(body))
        await _read(reader, answer)
    finally:
        answer.end_s = time.monotonic()
        writer.close()
    return answer


def _request(body: dict) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


async def _read(reader: asyncio.StreamReader, answer: Answer) -> None:
    status = await reader.readline()
    answer.status = int(status.split()[1]) if status else 0
    headers = [line async for line in _until_blank(reader)]
    if not any(line.lower().startswith(b"content-type: text/event-stream") for line in headers):
        content = await reader.read()
        answer.events, answer.done = [json.loads(content)] if content else [], bool(content)
        return
    async for line in reader:  # every chunk of the transfer coding holds whole events
        if line == b"data: [DONE]\n":
            answer.done = True
        elif line.startswith(b"data: "):
            answer.first_s = answer.first_s or time.monotonic()
            answer.events.append(json.loads(line[6:]))


async def _until_blank(reader: asyncio.StreamReader):
    while (line := await reader.readline()).strip():
        yield line
