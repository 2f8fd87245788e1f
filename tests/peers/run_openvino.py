"""Run of OpenVINO GenAI (continuous batching, prefix caching), in its own environment.

python run_openvino.py MODEL_F16.gguf [--dtype=bfloat16] WORKLOAD.jsonl ... prints a JSON line per workload

The precision is always set, because OpenVINO defaults to bfloat16 on processors with instructions for it.
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai


def main(model: str, arguments: list[str]) -> None:
    precision = "bf16" if "--dtype=bfloat16" in arguments else "f32"
    config = genai.SchedulerConfig()
    config.cache_size = 2  # GB
    config.max_num_seqs = 64
    config.max_num_batched_tokens = 2048
    config.enable_prefix_caching = True
    began = time.perf_counter()
    pipeline = genai.ContinuousBatchingPipeline(model, config, "CPU", {"INFERENCE_PRECISION_HINT": precision})
    start_s = time.perf_counter() - began
    for path in (argument for argument in arguments if not argument.startswith("--")):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        began = time.perf_counter()
        handles = []
        for row in rows:
            config_of_row = genai.GenerationConfig()
            config_of_row.max_new_tokens = row["max_tokens"]
            config_of_row.ignore_eos = True
            config_of_row.do_sample = False
            handles.append(
                pipeline.add_request(row["id"], openvino.Tensor(np.array([row["ids"]], np.int64)), config_of_row)
            )
        while pipeline.has_non_finished_requests():
            pipeline.step()
        answers = [output.generated_ids for handle in handles for output in handle.read_all()]
        seconds = time.perf_counter() - began
        result = {"seconds": seconds, "generated": sum(map(len, answers)), "start_s": start_s}
        result["version"] = importlib.metadata.version("openvino-genai")
        print(json.dumps(result), flush=True)


main(sys.argv[1], sys.argv[2:])
