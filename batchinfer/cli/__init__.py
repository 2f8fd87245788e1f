"""Command line: options and environment in, exit codes out."""
