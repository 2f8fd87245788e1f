"""Python values of table cells and their text form, which is the same in prompts, messages and JSON lines."""
