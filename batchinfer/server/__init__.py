"""HTTP endpoint: OpenAI's routes over the engine of a job.

Two threads share the work, and each alone owns its state:

- The *engine thread* (`engine_loop`) owns the `Engine`. Commands (prepared requests, aborts) reach it through a
  thread-safe inbox that it empties before every step. Events (new tokens, finished samples) leave it once per step,
  all together, so that the asyncio loop wakes up once per step and not once per token.
- The *asyncio thread* owns connections, open generations and text. `frontend` admits requests (a bounded queue),
  encodes and checks prompts in a small thread pool, submits requests to the engine, and delivers events to their
  generation. HTTP never waits for a step.

A request passes: `middleware` (API key, body size, draining) → `openai.request_models` → `generation_routes` →
`respond` → `openai.parse` → `frontend` → engine thread → `sample_texts` (incremental detokenizing, stop strings) → a
reply (`choice_reply` with choices, `event_reply` with named events) → JSON, or server-sent events (`sse`). When a
client disconnects, its generation is closed and its sequences are aborted.

Failures: a wrong request gets 400 before the engine sees it. If the engine fails, every request gets 500 and /health
says why. During shutdown the middleware answers 503; open generations finish or end with an error event.
"""
