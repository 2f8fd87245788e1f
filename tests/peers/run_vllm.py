"""Run of vLLM's CPU build (prefix caching, both cores), in its own environment.

python run_vllm.py MODEL_FOLDER [--dtype=bfloat16] WORKLOAD.jsonl ... prints a JSON line per workload
"""

import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault(
    "VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}"
)  # by default vLLM leaves a core idle
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["HF_HUB_OFFLINE"] = "1"

from vllm import LLM, SamplingParams, TokensPrompt


def main(model: str, arguments: list[str]) -> None:
    began = time.perf_counter()
    llm = LLM(
        model=model,
        dtype="bfloat16" if "--dtype=bfloat16" in arguments else "float32",
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enforce_eager=True,
    )
    start_s = time.perf_counter() - began
    for path in (argument for argument in arguments if not argument.startswith("--")):
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        prompts = [TokensPrompt(prompt_token_ids=row["ids"]) for row in rows]
        common = {"temperature": 0, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(max_tokens=row["max_tokens"], **common) for row in rows]
        llm.reset_prefix_cache()
        began = time.perf_counter()
        answers = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - began
        result = {"seconds": seconds, "generated": sum(len(answer.outputs[0].token_ids) for answer in answers)}
        result |= {"start_s": start_s, "version": importlib.metadata.version("vllm-cpu")}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
