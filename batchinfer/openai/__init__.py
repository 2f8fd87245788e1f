"""OpenAI's API, and Anthropic's messages, as values: request bodies parsed and response bodies written.

The endpoint's routes and a job's openai-batch rows share this package, so that a body means the same in both. It knows
neither HTTP nor files.

`request_models` (fields and types of a body) → `parse` (prompts, prompt options, sampling parameters) → the engine →
`chat_response`, `completion_response` or `embedding_response` (choices with text, tool calls and logprobs; vectors).

/v1/responses and /v1/messages are converted to a chat (`as_chat`, `responses_request`, `messages_request`); their
responses are a chat's answer as content blocks (`content_blocks`, `responses_response`, `messages_response`).
"""
