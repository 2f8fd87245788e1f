"""Runner: a step plan through the model, from token ranges to sampled tokens."""
