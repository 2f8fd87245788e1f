"""Batches of the endpoint, as OpenAI has them: each one runs as a job."""
