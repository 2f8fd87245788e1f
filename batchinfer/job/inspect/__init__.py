"""Read an output without touching it: preview, show, status, verify."""
