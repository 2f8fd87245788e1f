"""Real clients against a server that this starts, each in its own process; `make clients` sets up their environments.

python -m tests.clients.run [--samples N] [--minutes N] [CHECK …]
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from transformers.utils import logging

from tests.clients.checks import CHECKS
from tests.clients.place import Failed, Place, free_port, serving
from tests.models.smollm2 import write_safetensors

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".clients"
GGUF = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.clients.run", description=__doc__)
    parser.add_argument("--clients", type=Path, default=CLIENTS, help="folder with the environments main and aiperf")
    parser.add_argument("--model", type=Path, default=GGUF, help="the GGUF file")
    parser.add_argument("--work", type=Path, default=CLIENTS / "work", help="logs and results; emptied first")
    parser.add_argument("--samples", type=int, default=12, help="of each task of lm-eval, 100 at most")
    parser.add_argument("--minutes", type=float, default=5, help="how long the soak lasts")
    parser.add_argument("checks", nargs="*", help=f"default all: {' '.join(CHECKS)}")
    asked = parser.parse_args()
    if unknown := set(asked.checks) - CHECKS.keys():
        parser.error(f"no such check: {', '.join(sorted(unknown))}")
    work = asked.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    clients = asked.clients.resolve()
    environments = (clients / "main", clients / "aiperf")
    place = Place(ROOT, *environments, work / "model", work, free_port(), asked.samples, asked.minutes)
    logging.disable_progress_bar()
    write_safetensors(asked.model, place.model)
    failed = 0
    with serving(place, asked.model):
        for name in asked.checks or CHECKS:
            failed += not _passes(name, place)
    print(f"{failed} of {len(asked.checks or CHECKS)} failed; logs in {work}" if failed else "all passed")
    return min(failed, 1)


def _passes(name: str, place: Place) -> bool:
    began = time.monotonic()
    try:
        said, good = CHECKS[name](place), True
    except Failed as problem:
        said, good = str(problem), False
    except (OSError, KeyError, ValueError, TypeError) as problem:  # a report of another form than expected
        said, good = f"{type(problem).__name__}: {problem}", False
    print(f"{'pass' if good else 'FAIL'}  {name:<13} {time.monotonic() - began:6.0f} s", flush=True)
    for line in said.splitlines():
        print(f"      {line}", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
