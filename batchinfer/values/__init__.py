"""What a cell is in Python, and its one text: the same in prompts, in messages and in the lines of an output."""
