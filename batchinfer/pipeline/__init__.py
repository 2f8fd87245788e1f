"""Pipeline: prompts through the engine, from a row's text to its completion."""
