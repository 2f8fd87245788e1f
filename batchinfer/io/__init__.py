"""Input and output: storage, rows, and the formats of files."""
