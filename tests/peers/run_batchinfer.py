"""Run of batchinfer on the comparison's workloads.

python -m tests.peers.run_batchinfer MODEL [--NAME=VALUE] WORKLOAD.jsonl ... prints a JSON line per workload

NAME is a field of the engine: dtype, quantization.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import batchinfer
from batchinfer import LLM, SamplingParams
from batchinfer.bench.cost import LinearCost
from batchinfer.layers.linear import Linear
from batchinfer.models.config import load_config, parse_config
from batchinfer.models.decoder import Decoder
from batchinfer.models.gguf import GGUFFile


def main(model: str, arguments: list[str]) -> None:
    options = dict(argument[2:].split("=") for argument in arguments if argument.startswith("--"))
    began = time.perf_counter()
    llm = LLM(model, max_num_seqs=64, max_step_tokens=2048, kv_cache_tokens=46_000, **options)
    import torch
    from batchinfer_kernels.eager import EagerBackend
    from batchinfer_kernels.formats import Precision

    start_s = time.perf_counter() - began
    path = Path(model)
    config = load_config(path) if path.is_dir() else parse_config(GGUFFile(path).config_dict(), model)
    with torch.device("meta"):
        decoder = Decoder(EagerBackend(torch.device("meta")), config)
        for linear in (module for module in decoder.modules() if isinstance(module, Linear)):
            linear.pack_weight(torch.empty(linear.out_features, linear.in_features), Precision.FLOAT32)
    cost = LinearCost.of(decoder)
    for workload in (argument for argument in arguments if not argument.startswith("--")):
        rows = [json.loads(line) for line in Path(workload).read_text().splitlines()]
        before = replace(llm.stats())  # a copy, because the counters are cumulative and mutable
        began = time.perf_counter()
        answers = llm.generate(
            [row["ids"] for row in rows],
            [SamplingParams(temperature=0, max_tokens=row["max_tokens"], ignore_eos=True) for row in rows],
        )
        seconds = time.perf_counter() - began
        done = llm.stats()
        generated = done.generated_tokens - before.generated_tokens
        computed = done.prompt_tokens_computed - before.prompt_tokens_computed + generated - len(rows)
        assert generated == sum(len(answer.outputs[0].token_ids) for answer in answers)
        result = {"seconds": seconds, "generated": generated, "start_s": start_s, "version": batchinfer.__version__}
        print(json.dumps(result | {"operations": cost.operations(computed, generated)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
