"""Input lines of batches, and helpers that read their results."""

import json
import time

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "cancelled", "expired")


def line(number, **changes):
    body = {"model": "fake", "messages": [{"role": "user", "content": f"Row {number}"}], "max_tokens": 12}
    body |= changes.pop("body", {})
    values = {"custom_id": f"row-{number}", "method": "POST", "url": CHAT, "body": body, **changes}
    return {name: value for name, value in values.items() if value is not None}


def content(lines):
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


def rows(count, **changes):
    return content(line(number, **changes) for number in range(count))


def parsed(data):
    return [json.loads(each) for each in data.splitlines()]


def wait_for(read, accepted=ENDED, timeout_s=30.0):
    """Poll a batch until its status is one of `accepted`."""
    give_up = time.monotonic() + timeout_s
    while True:
        batch = read()
        if batch["status"] in accepted:
            return batch
        assert time.monotonic() < give_up, batch
        time.sleep(0.02)


def gone(path, timeout_s=10.0):
    """Return True if a path vanishes soon: a batch's folder is removed after its last status."""
    give_up = time.monotonic() + timeout_s
    while path.exists() and time.monotonic() < give_up:
        time.sleep(0.01)
    return not path.exists()
