"""Every fenced block of the documentation works: one rule per language, and a language without a rule fails.

yaml jobs are loaded as job specs · python runs · console runs, and its output is compared but for numbers · sh lines
are parsed, and those about a job that the page gives run · text is a tree or a diagram whose names exist.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from batchinfer.cli.main import main
from batchinfer.job.drain import Drain
from batchinfer.llm import LLM
from batchinfer.spec import load_spec
from tests.docs import commands
from tests.docs.names import check_paths
from tests.docs.pages import PAGES, ROOT, Block, blocks_of, name_of
from tests.server.conftest import Endpoint

README = ROOT / "README.md"
BUCKET = "my-bucket"
_PRESETS = {  # what a fragment of a job file leaves out
    "model": "fake",
    "input": {"path": "x.jsonl"},
    "prompt": {"template": "x"},
    "output": {"path": "out"},
}
_SHELL = {"ls", "cat"}


class Place:
    """A folder that looks like a checkout to the snippets of one page, which run in it in their order."""

    def __init__(self, folder: Path, environment: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.environment = environment
        self.store = None
        self.values: dict[str, str] = {}  # of the variables whose value a page leaves open
        (folder / "jobs").symlink_to(ROOT / "jobs")

    def run(self, arguments: list[str]) -> tuple[int, str]:
        """Run a command line of batchinfer, and return its exit code and what it printed to stdout."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main(["--no-log-json", *arguments])
        return code, out.getvalue()

    def put_model(self, path: Path) -> None:
        (self.folder / ".models").mkdir()
        (self.folder / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(path)

    def knows(self, arguments: list[str]) -> bool:
        """Return True if a command is about a job that the page gives."""
        verbs = ("run", "plan", "verify", "status", "show")
        return len(arguments) > 1 and arguments[0] in verbs and (self.folder / arguments[1]).is_file()

    def connect(self, store) -> None:
        """Make the bucket of the examples, with input in it."""
        self.store = store.filesystem()
        with contextlib.suppress(FileExistsError):
            self.store.mkdir(BUCKET)
        rows = (ROOT / "jobs" / "data" / "tickets.jsonl").read_bytes().splitlines(keepends=True)
        self.store.pipe_file(f"{BUCKET}/tickets/tickets.jsonl", b"".join(rows[:4]))

    def forget(self) -> None:
        """Remove what the last command wrote to the bucket: the examples of a page are alternatives."""
        if self.store is not None:
            for path in self.store.find(BUCKET):
                if "/tickets/" not in path:
                    self.store.rm_file(path)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Drain, "install", lambda self: None)
    monkeypatch.setenv("COLUMNS", "100")
    yield Place(tmp_path, monkeypatch)


def _needs_model(page: Path) -> bool:
    """Return True if a page runs the model of the quickstart, or a job with its tokenizer."""
    return any(re.search(r"\.models/|run jobs/|plan jobs/", block.text) for block in blocks_of(page))


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=name_of(page), marks=[pytest.mark.model] * _needs_model(page)) for page in PAGES],
)
@pytest.mark.timeout(300)
def test_snippets(page, place, request):
    blocks = blocks_of(page)
    if _needs_model(page):
        place.put_model(request.getfixturevalue("smollm2_gguf"))
    if page != README:  # what stands there as well runs there
        there = {block.text for block in blocks_of(README)}
        blocks = [replace(block, title=None) if block.text in there else block for block in blocks]
    if any("s3://" in block.text for block in blocks if block.title):
        seaweed = request.getfixturevalue("seaweed")
        place.connect(seaweed)
        place.values = {**seaweed.env, "AWS_ENDPOINT_URL": seaweed.endpoint}
    for block in blocks:
        rule = RULES.get(block.language)
        assert rule is not None, f"{block.where}: no rule for blocks of the language {block.language!r}"
        try:
            rule(block, place)
        except Exception as error:
            error.add_note(f"in {block.where}")
            raise


# -- yaml ----------------------------------------------------------------------------------------------------------


def run_yaml(block: Block, place: Place) -> None:
    values = yaml.safe_load(block.text)
    if "apiVersion" in values:
        return check_manifest(values)
    path = place.folder / (block.title or "fragment.yaml")
    if (ROOT / path.relative_to(place.folder)).is_file():
        lines = (ROOT / path.relative_to(place.folder)).read_text(encoding="utf-8").splitlines()
        assert block.text.splitlines() == [line for line in lines if not line.startswith("#")], block.title
    else:
        path.write_text(block.text, encoding="utf-8")
    presets = {}
    for section, preset in _PRESETS.items():
        if section not in values:
            presets[section] = preset
        elif isinstance(preset, dict) and section != "prompt":
            presets |= {f"{section}.{key}": value for key, value in preset.items() if key not in values[section]}
    if "openai-batch" in block.text:  # its lines are prompts already
        del presets["prompt"]
    load_spec(path, presets)
    return None


def check_manifest(values) -> None:
    """Check a Kubernetes Job: its command is ours, and it passes its number of completions."""
    [container] = values["spec"]["template"]["spec"]["containers"]
    assert container["command"][0] == "batchinfer"
    commands.check_batchinfer(container["command"][1:])
    assert container["env"] == [{"name": "BATCHINFER_SHARD_COUNT", "value": str(values["spec"]["completions"])}]
    [rule] = values["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"operator": "NotIn", "values": [33, 75]}


# -- python --------------------------------------------------------------------------------------------------------


def run_python(block: Block, place: Place) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})


# -- console -------------------------------------------------------------------------------------------------------


def run_console(block: Block, place: Place) -> None:
    steps = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert steps[0] == "" and len(steps) > 1, "a console block begins with `$ `"
    for step in steps[1:]:
        line, _, shown = step.partition("\n")
        program, *arguments = shlex.split(line)
        if program == "batchinfer":
            _, printed = place.run(arguments)
        else:
            assert program in _SHELL, program
            printed = subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout
        assert alike(shown.splitlines(), printed.splitlines()), f"$ {line}\n{printed}"


def alike(shown: list[str], printed: list[str]) -> bool:
    """Return True if lines are equal but for numbers and runs of spaces; `...` stands for any number of lines."""
    if not shown:
        return not printed
    if shown[0] == "...":
        return any(alike(shown[1:], printed[start:]) for start in range(len(printed) + 1))
    return bool(printed) and _plain(shown[0]) == _plain(printed[0]) and alike(shown[1:], printed[1:])


def _plain(line: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\d[\d,.]*", "0", line)).strip()


# -- sh ------------------------------------------------------------------------------------------------------------


def run_sh(block: Block, place: Place) -> None:
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "export":
            for word in words[1:]:
                name, _, value = word.partition("=")
                assert re.fullmatch(r"(AWS|BATCHINFER)_[A-Z_]+", name), word
                place.environment.setenv(name, place.values.get(name, "x") if value == "…" else value)
            continue
        commands.check(line)
        if words[0] == "batchinfer" and place.knows(words[1:]):
            if words[1] == "run":
                place.forget()
            assert place.run(words[1:])[0] == 0, line
        elif words[0] == "sbatch":
            run_array(words[1:], place)
        elif words[0] == "curl":
            run_request(*commands.curl(words[1:]))


def run_request(route: str, body: object) -> None:
    """Send a request to an endpoint with a fake model."""
    endpoint = Endpoint(LLM("fake"), chat_template="{{ messages[-1].content }}")
    try:
        response = endpoint.post(route, body)
    finally:
        endpoint.close()
    assert response.status_code == 200, response.text


def run_array(arguments: list[str], place: Place) -> None:
    indices, wrapped = commands.sbatch(arguments)
    words = shlex.split(wrapped.removeprefix("exec "))
    if not place.knows(words[1:]):
        return
    place.forget()
    for index in indices:
        with place.environment.context() as environment:
            for name, value in commands.slurm(indices, index).items():
                environment.setenv(name, value)
            assert place.run(words[1:])[0] == 0, f"{wrapped}, shard {index}"
    assert place.run(["verify", words[2]])[0] == 0


# -- text ----------------------------------------------------------------------------------------------------------


def run_text(block: Block, place: Place) -> None:
    """Check that a tree of an output has the names that a job leaves, and that paths in a diagram exist."""
    first = block.text.splitlines()[0]
    if first.startswith("output/"):
        shown = set(re.findall(r"^  (\S+)", block.text, re.MULTILINE))
        assert place.run(["run", "jobs/rehearsal.yaml"])[0] == 0
        left = {f"{entry.name}/" if entry.is_dir() else entry.name for entry in Path("output/rehearsal").glob("[!.]*")}
        assert left <= shown and shown <= left | {"salvage/", "summaries/"}
    check_paths(block.text, block.where)


RULES = {"yaml": run_yaml, "python": run_python, "console": run_console, "sh": run_sh, "text": run_text}


def test_numbers_vary_and_words_do_not():
    assert alike(["12 rows in 1 s", "...", "end"], ["12 rows in 3.5 s", "a", "b", "end"])
    assert alike(["...", "a"], ["a"]) and not alike(["a"], ["a", "b"]) and not alike(["1 row"], ["1 rows"])


@pytest.mark.parametrize(
    "line",
    [
        "batchinfer run job.yaml --shards 3",
        "batchinfer bench speed",
        "make everything",
        "pip install batchinfer",
        "rm -rf /",
    ],
)
def test_a_wrong_line_is_found(line):
    with pytest.raises(Exception):  # noqa: B017 - the parser's own errors or an assertion
        commands.check(line)
