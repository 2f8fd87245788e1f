"""OpenAI's API, and Anthropic's messages, as values: what a request's body asks for, and what its answer looks like.

The endpoint's routes and a job's openai-batch lines both go through here, so that a body means the same in both.
Nothing here knows of HTTP or of files.

What /v1/responses and /v1/messages ask for is a chat in other words (`as_chat`, `responses`, `messages`), and their
answers are a chat's, told in blocks (`blocks`, `response_answer`, `message_answer`).

A body's way: `bodies` (its fields and their types) → `asked` (prompts, sampling parameters, what the template gets) →
the engine → `answers` (choices with their texts, tool calls and logprobs, or vectors).
"""
