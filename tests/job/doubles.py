"""Stand-ins for a job's dependencies: a store in memory that can fail, a model that answers as it is told."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchinfer.errors import StorageError
from batchinfer.io.filesystem import Retry
from batchinfer.io.storage import Listed, Store
from batchinfer.job.run import run_job
from batchinfer.job.run_state import Dependencies
from batchinfer.openai.parse import ModelFacts
from batchinfer.request import Completion, CompletionOutput, SamplingParams
from batchinfer.spec import parse_spec
from batchinfer.text.tokenizer import ByteTokenizer


class MemoryStore(Store):
    """Objects in a dict. `crash_at` k: the k-th operation raises, before or after its effect, and all later."""

    def __init__(self, objects=None, crash_at=None, after=False):
        super().__init__("memory://out", Retry(""))
        self.objects = {} if objects is None else objects
        self.operations = 0
        self.crash_at = crash_at
        self.after = after
        self.lock = threading.RLock()

    def _operate(self, effect):
        with self.lock:
            self.operations += 1
            dead = self.crash_at is not None and self.operations >= self.crash_at
            if dead and not (self.after and self.operations == self.crash_at):
                raise StorageError("crash")
            result = effect()
            if dead:
                raise StorageError("crash after the effect")
            return result

    def read(self, name):
        return self._operate(lambda: self.objects.get(name))

    def scan(self, prefix=""):
        found = lambda: [Listed(n, len(d), None) for n, d in self.objects.items() if n.startswith(prefix)]  # noqa: E731
        return iter(self._operate(found))

    def put(self, name, data):
        self._operate(lambda: self.objects.__setitem__(name, data))

    def put_file(self, name, local):
        self.put(name, Path(local).read_bytes())

    def get_file(self, name, local):
        Path(local).write_bytes(self.objects[name])

    def delete(self, names):
        for name in list(names):
            self._operate(lambda name=name: self.objects.pop(name, None))

    def _create(self, name, data):
        def effect():
            if name in self.objects:
                return False
            self.objects[name] = data
            return True

        return self._operate(effect)


class MarkingStore(MemoryStore):
    """Marks objects in listings, by the MD5 of their bytes unless `mark` is another function; knows what was asked."""

    def __init__(self, objects=None, mark=lambda data: hashlib.md5(data).hexdigest()):
        super().__init__(objects)
        self.mark = mark
        self.reads = []
        self.scans = 0

    def read(self, name):
        self.reads.append(name)
        return super().read(name)

    def scan(self, prefix=""):
        self.scans += 1
        with self.lock:
            return iter([Listed(n, len(d), self.mark(d)) for n, d in self.objects.items() if n.startswith(prefix)])


class Stats:
    prompt_tokens_computed = prompt_tokens_reused = generated_tokens = steps = preemptions = 0
    draft_tokens = accepted_tokens = 0


class ScriptedLLM:
    """Answers `<prompt>!`; `answer(prompt)` may return an error or a text instead. `order` shuffles a small window."""

    def __init__(self, answer=None, order=None, after=None):
        tokenizer = ByteTokenizer()
        self.model_facts = ModelFacts(("fake",), tokenizer, tokenizer.chat_template, SamplingParams(max_tokens=8))
        self.answer = answer or (lambda prompt: None)
        self.order = order
        self.after = after or (lambda done: None)
        self.seen = []

    def stats(self):
        return Stats()

    def run_prompts(self, prompts):
        held, done = [], 0
        for prompt in prompts:
            held.append(self._complete(prompt))
            if self.order is None or len(held) >= 5:
                if self.order:
                    self.order.shuffle(held)
                done += 1
                self.after(done)
                yield held.pop()
        yield from held

    def _complete(self, prompt):
        self.seen.append(prompt)
        if prompt.error is not None:
            return Completion(prompt.index, [], error=prompt.error)
        said = self.answer(prompt)
        params = prompt.params or self.model_facts.defaults
        ids = [1, 2, prompt.index % 100]
        if isinstance(said, Exception):
            return Completion(prompt.index, ids, error=said)
        text = said or f"{prompt.contents[0]}!"
        outputs = [CompletionOutput(f"{text}{n or ''}", [n, 7], "stop") for n in range(params.n)]
        return Completion(prompt.index, ids, outputs)


def write_parquet(path, rows, **columns):
    table = pa.table({"id": pa.array(range(rows)), "text": [f"row {n}" for n in range(rows)], **columns})
    pq.write_table(table, path)
    return path


def job(tmp_path, **sections):
    """Return a small job over `tmp_path/in.parquet`; a section given replaces or extends the default one."""
    values = {
        "model": "fake",
        "input": {"path": str(tmp_path / "in.parquet")},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_tokens": 8},
        "output": {"path": str(tmp_path / "out"), "chunk_rows": 4},
        "fake": {"answer_tokens": 3},
        "engine": {"max_num_seqs": 4},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    for name in [name for name, value in values.items() if value is None]:
        del values[name]
    return parse_spec(values)


def run(spec, llm=None, store=None, job=run_job, **worker):
    replaced = {}
    if llm is not None:
        replaced["load_llm"] = lambda *_: llm
    if store is not None:
        replaced["open_store"] = lambda _: store
    return job(spec, dependencies=Dependencies(**replaced), **worker)


def rows_of_output(path):
    """All rows of an output's parts, in order of the parts' names."""
    rows = []
    for part in sorted(Path(path, "parts").iterdir()):
        if part.suffix == ".parquet":
            rows += pq.read_table(part).to_pylist()
        else:
            rows += [json.loads(line) for line in part.read_text().splitlines()]
    return rows


def snapshot(path):
    """Name → bytes of everything that must not depend on what happened on the way."""
    names = ("parts", "commits", "plan.json", "manifest.json", "_SUCCESS")
    root = Path(path)
    files = [p for p in root.rglob("*") if p.is_file() and p.relative_to(root).parts[0] in names]
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(files)}
