"""The endpoint: OpenAI's routes over the engine of the job, for as long as somebody needs them.

Two threads share the work, and each owns its state alone:

- The *engine thread* (`engine_loop`) owns the `Engine`: nobody else touches it. Commands (prepared requests, aborts)
  reach it through a thread-safe inbox that it empties before every step; events (new tokens, finished samples) leave it
  once per step, all together, so that the asyncio loop wakes up once per step and not once per token.
- The *asyncio thread* owns connections, open generations and text. `frontend` admits requests (a bounded queue),
  renders, tokenizes and checks prompts in a small pool, one `Preparer.prepare` at a time, hands requests over, and
  hands events to the generation that waits for them. HTTP never waits for a step.

One request's way: `gate` (key, size, draining) → `wire.bodies` → `wire.asked` → `frontend.prepare` → engine thread →
`samples` (incremental text, stop strings, UTF-8 across tokens) → a reply (`choices`: those of `wire.completions` or
`wire.chat`; `events`: named ones) → JSON, or server-sent events in `stream`. A client that goes away closes its
generation, which aborts its sequences.

What fails: a wrong request is a 400 before the engine sees it; an engine that gives up answers 500 to all, and /health
says why; on shutdown the gate answers 503, and open generations finish or end with an error event.
"""
