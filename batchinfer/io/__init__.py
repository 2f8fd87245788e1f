"""Input and output: object storage, rows, and file formats."""
