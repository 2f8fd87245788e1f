"""Models: their configuration, the table of families, the decoder, and how weights are read."""
