"""OpenVINO GenAI's continuous batching with prefix caching; runs in an environment of its own.

python run_openvino.py MODEL_F16.gguf WORKLOAD.jsonl ...    prints a JSON line per workload
"""

import importlib.metadata
import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai


def main(model: str, workloads: list[str]) -> None:
    config = genai.SchedulerConfig()
    config.cache_size = 2  # GB
    config.max_num_seqs = 64
    config.max_num_batched_tokens = 2048
    config.enable_prefix_caching = True
    began = time.perf_counter()
    pipeline = genai.ContinuousBatchingPipeline(model, config, "CPU", {})
    start_s = time.perf_counter() - began
    for path in workloads:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        began = time.perf_counter()
        handles = []
        for row in rows:
            wanted = genai.GenerationConfig()
            wanted.max_new_tokens = row["max_tokens"]
            wanted.ignore_eos = True
            wanted.do_sample = False
            handles.append(pipeline.add_request(row["id"], openvino.Tensor(np.array([row["ids"]], np.int64)), wanted))
        while pipeline.has_non_finished_requests():
            pipeline.step()
        answers = [output.generated_ids for handle in handles for output in handle.read_all()]
        seconds = time.perf_counter() - began
        found = {"seconds": seconds, "generated": sum(map(len, answers)), "start_s": start_s}
        found["version"] = importlib.metadata.version("openvino-genai")
        print(json.dumps(found), flush=True)


main(sys.argv[1], sys.argv[2:])
