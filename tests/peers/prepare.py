"""Inputs of the comparison: the quickstart model in each engine's format, and the workloads as token ids.

python -m tests.peers.prepare MODEL.gguf FOLDER

mixed: lengths distributed as in chat logs, no shared prefix. label: one instruction of 600 tokens, short rows, short
outputs. The text is the documentation of Python's standard library. Output lengths are fixed: greedy, end of sequence
ignored.
"""

from __future__ import annotations

import importlib
import inspect
import json
import random
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np

from batchinfer.text.tokenizer import load_tokenizer
from tests.models.smollm2 import write_safetensors

MODULES = """
    json re textwrap argparse logging decimal fractions statistics random string collections itertools functools heapq
    bisect pathlib shutil tempfile glob csv sqlite3 zipfile tarfile hashlib hmac secrets threading subprocess socket
    asyncio datetime calendar unittest doctest typing dataclasses enum abc contextlib pickle copy pprint difflib
    inspect ast dis
"""
SEED = 7


def documentation(rng: random.Random) -> str:
    texts = []
    for name in MODULES.split():
        for attribute, value in sorted(vars(importlib.import_module(name)).items()):
            text = inspect.getdoc(value) if callable(value) else None
            if text and len(text) > 120:
                texts.append(f"{name}.{attribute}: {text}")
    rng.shuffle(texts)
    return "\n\n".join(texts)


def workloads(model: Path) -> dict[str, list[dict[str, object]]]:
    rng = random.Random(SEED)
    [pool] = load_tokenizer(model).encode_batch([documentation(rng)], add_special_tokens=False)

    def cut(length: int) -> list[int]:
        start = rng.randrange(len(pool) - length)
        return pool[start : start + length]

    def spread(mu: float, low: int, high: int) -> int:
        return int(min(high, max(low, rng.lognormvariate(mu, 0.7))))

    instruction = cut(600)
    mixed = [(cut(spread(4.8, 16, 700)), spread(4.3, 8, 256)) for _ in range(96)]
    label = [(instruction + cut(rng.randrange(20, 80)), 12) for _ in range(128)]
    return {
        name: [{"id": number, "ids": ids, "max_tokens": count} for number, (ids, count) in enumerate(rows)]
        for name, rows in (("mixed", mixed), ("label", label))
    }


def write_float16(model: Path, to: Path) -> None:
    """Write a GGUF file with float16 matrices: OpenVINO reads GGUF, but not Q4_1."""
    reader = gguf.GGUFReader(model)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(to, architecture)
    for key, field in reader.fields.items():
        if key == "general.file_type":
            writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        elif not key.startswith("GGUF.") and key != "general.architecture":
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if array else None)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in workloads(model).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_safetensors(model, folder / "model")
    write_float16(model, folder / "model-f16.gguf")
    shutil.copyfile(model, folder / "model.gguf")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
