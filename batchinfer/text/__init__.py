"""Text: tokenizers, chat templates, detokenization and stop strings."""
