"""Layers of the decoder, over `ops`."""
