"""The Python API, text in and completions out: tokenizer, engine and detokenizer. The job builds on it.

llm = LLM("SmolLM2-135M-Instruct.Q4_1.gguf")
for completion in llm.stream(["Once upon a time"], SamplingParams(max_tokens=32)):
    print(completion.outputs[0].text)
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from batchinfer.assembly import Assembly, assemble
from batchinfer.engine.engine import Engine
from batchinfer.engine.scheduler import EngineStats, Scheduler
from batchinfer.errors import ModelError, RowError, UsageError, suggest
from batchinfer.io.fetch import ModelFiles, fetch_model
from batchinfer.prompting import Content, Feeder, Prepared, Preparer, Prompt, mix
from batchinfer.request import Completion, Finished, Output, SamplingParams
from batchinfer.spec import FAKE_MODEL, EngineSpec, FakeSpec, JobSpec, StorageSpec

__all__ = ["LLM", "Prompt"]

_MISSING = SamplingParams()  # marks a prompt beyond the last of the given parameters
_DETOKENIZE_TOGETHER = 32  # finished prompts that are turned into text in one call


class LLM:
    """A model, ready to answer.

    model: a directory, a .gguf file, an fsspec URL or a Hugging Face id; "fake" answers without a model.
    tokenizer: where another tokenizer comes from. seed: of the random numbers of `generate` and `stream`.
    options: the fields of a job's `engine` section (dtype, kv_cache_tokens, max_num_seqs, enable_prefix_caching, …).
    Raises ModelError, UsageError for an unknown option.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tokenizer: str | Path | None = None,
        seed: int = 0,
        storage: StorageSpec | None = None,
        fake: FakeSpec | None = None,
        chat_template: str | None = None,
        **options: Any,
    ) -> None:
        storage = storage or StorageSpec()
        files = None if str(model) == FAKE_MODEL else fetch_model(str(model), storage)
        other = None if tokenizer is None else fetch_model(str(tokenizer), storage, weights=False)
        engine = _engine_spec(options)
        self._setup(assemble(engine, files, other, fake or FakeSpec(), chat_template), engine, seed)

    @classmethod
    def from_spec(cls, spec: JobSpec, files: ModelFiles | None) -> LLM:
        """The model of a job; `files` as `fetch_model` returned them, None for the fake model."""
        llm = cls.__new__(cls)
        prompt = spec.prompt
        other = None if spec.tokenizer is None else fetch_model(spec.tokenizer, spec.storage, weights=False)
        assembly = assemble(spec.engine, files, other, spec.fake, prompt.chat_template if prompt else None)
        if assembly.chat is None and prompt is not None and (prompt.user is not None or prompt.messages is not None):
            raise ModelError(f"{spec.model}: has no chat template: give prompt.chat_template, or use prompt.template")
        kwargs = prompt.chat_template_kwargs if prompt else {}
        llm._setup(assembly, spec.engine, spec.seed, spec.sampling_values, kwargs)
        return llm

    # -- the public API -----------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Iterable[Content] | str,
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer all prompts; completions in input order. A bad prompt is an error completion."""
        return sorted(self.stream(prompts, sampling_params), key=lambda completion: completion.index)

    def stream(
        self,
        prompts: Iterable[Content] | str,
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
    ) -> Generator[Completion, None, None]:
        """Answer prompts as they come, completions as they finish. The prompts may be an endless iterator."""
        contents = [prompts] if isinstance(prompts, str) else prompts
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params: Iterator[SamplingParams | None] = repeat(sampling_params)
        else:
            params = chain(sampling_params, repeat(_MISSING))
        pairs = enumerate(zip(contents, params, strict=False))
        return self.run(_prompt(index, content, given, mix(self._seed, index)) for index, (content, given) in pairs)

    def stats(self) -> EngineStats:
        """Counters since the model was loaded: prompt tokens computed and reused, generated, steps, preemptions."""
        return self._engine.stats

    # -- the loop under it --------------------------------------------------------------------------------------

    def run(self, prompts: Iterable[Prompt]) -> Generator[Completion, None, None]:
        """Answer prompts in any order. `prompts` is read in a thread, a bounded number ahead of the engine.

        Closing the iterator stops the thread and drops what is running. One run at a time.
        """
        if self._groups:
            raise UsageError("this LLM is already running: finish or close the other stream first")
        feeder = Feeder(prompts, self._preparer)
        ready: list[_Group] = []
        try:
            while not feeder.done or self._engine.has_work or ready:
                yield from self._fill(feeder, wait=not (self._engine.has_work or ready))
                ready += self._collect(self._engine.step())
                if len(ready) >= _DETOKENIZE_TOGETHER or not self._engine.has_work:
                    yield from self._completions(ready)
                    ready.clear()
        finally:
            feeder.close()
            for group in {id(group): group for group in self._groups.values()}.values():
                for request in group.prepared.requests:
                    self._engine.abort(request.request_id)
            self._groups.clear()

    def _fill(self, feeder: Feeder, wait: bool) -> Iterator[Completion]:
        """Keep the engine's queue as long as its seats; yields the prompts that failed before the engine."""
        while self._engine.num_waiting < self._queue_target:
            batch = feeder.take(wait)
            wait = False
            if not batch:
                return
            for item in batch:
                if isinstance(item, Completion):
                    yield item
                else:
                    yield from self._start(item)

    def _start(self, prepared: Prepared) -> Iterator[Completion]:
        group = _Group(prepared)
        try:
            for request in prepared.requests:
                self._engine.add(request)
                self._groups[request.request_id] = group
        except RowError as error:  # the first sample is refused if any is: they have the same prompt
            yield Completion(prepared.index, prepared.ids, error=error)

    def _collect(self, finished: list[Finished]) -> list[_Group]:
        """The prompts whose last sample is among `finished`."""
        complete = []
        for answer in finished:
            group = self._groups.pop(answer.request.request_id)
            group.answers.append(answer)
            if len(group.answers) == len(group.prepared.requests):
                complete.append(group)
        return complete

    def _completions(self, groups: list[_Group]) -> Iterator[Completion]:
        """Turn finished groups into text, together: one call of the tokenizer for most of them."""
        answers = [answer for group in groups for answer in group.sorted_answers() if answer.error is None]
        texts: dict[int, str] = {}
        for skip in (True, False):
            same = [answer for answer in answers if answer.request.params.skip_special_tokens is skip]
            if same:
                decoded = self._tokenizer.decode_batch([_visible(answer) for answer in same], skip_special_tokens=skip)
                texts.update(zip((answer.request.request_id for answer in same), decoded, strict=True))
        for group in groups:
            prepared = group.prepared
            error = next((answer.error for answer in group.answers if answer.error is not None), None)
            if error is not None:
                yield Completion(prepared.index, prepared.ids, error=error)
                continue
            outputs = []
            for answer in group.sorted_answers():
                text = self._cut(prepared, answer, texts[answer.request.request_id])
                outputs.append(Output(text, answer.token_ids, answer.finish_reason, answer.logprobs))
            yield Completion(prepared.index, prepared.ids, outputs)

    def _cut(self, prepared: Prepared, answer: Finished, text: str) -> str:
        if prepared.stop is None or answer.finish_reason != "stop" or answer.token_ids[-1] in answer.request.stop_ids:
            return text
        after = 0
        early = prepared.params.min_tokens - 1  # a stop string that these tokens complete does not count
        if early > 0:
            skip = prepared.params.skip_special_tokens
            after = len(self._tokenizer.decode_batch([answer.token_ids[:early]], skip_special_tokens=skip)[0])
        return prepared.stop.cut(text, after)

    # -- construction -------------------------------------------------------------------------------------------

    def _setup(
        self,
        assembly: Assembly,
        engine: EngineSpec,
        seed: int,
        sampling: dict[str, Any] | None = None,
        chat_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.default_params = SamplingParams.from_mapping(sampling or {}, assembly.defaults)
        self._seed = seed
        self._tokenizer = assembly.tokenizer
        self._preparer = Preparer(assembly.tokenizer, assembly.limits, self.default_params, assembly.chat, chat_kwargs)
        scheduler = Scheduler(assembly.pool, engine.max_num_seqs, engine.max_step_tokens)
        self._engine = Engine(scheduler, assembly.runner)
        self._queue_target = max(64, engine.max_num_seqs)
        self._groups: dict[int, _Group] = {}


class _Group:
    """A prompt in the engine, and those of its samples that have ended."""

    __slots__ = ("answers", "prepared")

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.answers: list[Finished] = []

    def sorted_answers(self) -> list[Finished]:
        return sorted(self.answers, key=lambda answer: answer.request.request_id)


def _engine_spec(options: dict[str, Any]) -> EngineSpec:
    known = EngineSpec.model_fields
    for name in options:
        if name not in known:
            raise UsageError(f"LLM: unknown option {name!r}{suggest(name, known)} (known: {', '.join(known)})")
    try:
        return EngineSpec(**options)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UsageError(f"LLM: {problem['loc'][0]}: {problem['msg']}, got {problem['input']!r}") from None


def _prompt(index: int, content: Content, params: SamplingParams | None, key: int) -> Prompt:
    if params is _MISSING:
        raise UsageError(f"there are fewer sampling_params than prompts: prompt {index} has none")
    return Prompt(index, content, params, key)


def _visible(answer: Finished) -> list[int]:
    """The ids that become text: all but a stop token, unless it was asked for."""
    stopped = answer.finish_reason == "stop" and answer.token_ids[-1] in answer.request.stop_ids
    if stopped and not answer.request.params.include_stop_str_in_output:
        return answer.token_ids[:-1]
    return answer.token_ids
