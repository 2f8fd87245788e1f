"""The Python API, text in and completions out: tokenizer, engine and detokenizer. The job builds on it.

llm = LLM("SmolLM2-135M-Instruct.Q4_1.gguf")
for completion in llm.stream(["Once upon a time"], SamplingParams(max_tokens=32)):
    print(completion.outputs[0].text)
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from batchinfer.engine.blocks import BlockPool
from batchinfer.engine.engine import Engine, StepRunner
from batchinfer.engine.scheduler import Scheduler
from batchinfer.engine.stats import EngineStats
from batchinfer.errors import BadParameters, ModelError, SpecError, UsageError
from batchinfer.io.fetch import ModelFiles, fetch_model
from batchinfer.openai.parse import ModelFacts
from batchinfer.pipeline.encoding import Content, SpecialTokens
from batchinfer.pipeline.load import Assembly, assemble
from batchinfer.pipeline.prepare import ModelLimits, Preparer
from batchinfer.pipeline.prompt import Prompt, mix
from batchinfer.pipeline.scoring import Continuation, Measure, Pooled, Read, Rolling, continuations
from batchinfer.pipeline.stream import Stream
from batchinfer.request import Completion, Pooling, SamplingParams
from batchinfer.spec import FAKE_MODEL, EngineSpec, FakeSpec, JobSpec, StorageSpec, parse_section
from batchinfer.text.chat import ChatTemplate
from batchinfer.text.tokenizer import Tokenizer

__all__ = ["LLM", "Answerer", "Prompt"]


class EngineParts(NamedTuple):
    """Components that a server drives by itself: see `LLM.parts`."""

    engine: Engine
    preparer: Preparer
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    limits: ModelLimits
    defaults: SamplingParams
    max_num_seqs: int


class Defaults(NamedTuple):
    """Defaults of all prompts: sampling parameters, and for messages the variables of the chat template."""

    seed: int
    sampling: Mapping[str, Any] = {}
    chat_kwargs: dict[str, Any] | None = None
    special_tokens: SpecialTokens | None = None


_MISSING = SamplingParams()  # marks a prompt beyond the last of the given parameters


class Answerer(Protocol):
    """Model as a job uses it: an LLM of its own, or a share of the engine that a server runs.

    `model_facts.defaults` apply to prompts without parameters; the rest of `model_facts` is for rows that are requests.
    """

    @property
    def model_facts(self) -> ModelFacts: ...

    def run_prompts(self, prompts: Iterable[Prompt]) -> Generator[Completion, None, None]:
        """Answer prompts in any order, each exactly once. `prompts` is read in a thread, a bounded number ahead.

        Closing the iterator stops that thread and drops what is running. One run at a time.
        """

    def stats(self) -> EngineStats:
        """Counters since the model was loaded."""


class LLM:
    """A model, ready to answer.

    model: a directory, a .gguf file, an fsspec URL or a Hugging Face id; "fake" answers without a model.
    tokenizer: where another tokenizer comes from. seed: of the random numbers of `generate` and `stream`.
    options: the fields of a job's `engine` section (dtype, kv_cache_tokens, max_num_seqs, enable_prefix_caching, …).
    Raises ModelError, UsageError for an unknown option.
    """

    _running = False  # a stream is open

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
        engine = _engine_spec(options)  # before a download
        files = None if str(model) == FAKE_MODEL else fetch_model(str(model), storage)
        other = None if tokenizer is None else fetch_model(str(tokenizer), storage, weights=False)
        self.model_name = str(model)
        self._setup(assemble(engine, files, other, fake or FakeSpec(), chat_template), engine, Defaults(seed))

    @classmethod
    def from_spec(cls, spec: JobSpec, files: ModelFiles | None) -> Self:
        """Load the model of a job; `files` as `fetch_model` returned them, None for the fake model.

        Raises ModelError, SpecError where the job's grammar cannot be followed with the model's tokens.
        """
        llm = cls.__new__(cls)
        llm.model_name = spec.model
        prompt = spec.prompt
        other = None if spec.tokenizer is None else fetch_model(spec.tokenizer, spec.storage, weights=False)
        assembly = assemble(spec.engine, files, other, spec.fake, prompt.chat_template if prompt else None)
        if assembly.chat is None and prompt is not None and (prompt.user is not None or prompt.messages is not None):
            raise ModelError(f"{spec.model}: has no chat template: give prompt.chat_template, or use prompt.template")
        chat = (prompt.chat_template_kwargs, prompt.special_tokens) if prompt else ()
        llm._setup(assembly, spec.engine, Defaults(spec.seed, spec.sampling_values, *chat))
        try:
            llm._preparer.compile_grammar(llm.default_params)  # with the model's tokens: what `validate` could not know
        except BadParameters as error:
            raise SpecError(str(error), key="sampling.structured_outputs") from None
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
        return self.run_prompts(
            _prompt(index, content, given, mix(self._seed, index)) for index, (content, given) in pairs
        )

    def score(self, pairs: Iterable[tuple[Content, Continuation]]) -> list[Completion]:
        """Score each continuation by its likelihood after its context; `scores` of a completion has one entry.

        A context is a prompt of any kind (empty: the continuation follows the model's prefix token), a continuation a
        text or token ids. Of texts, spaces at the end of the context count to the continuation.
        """
        return self._read((context, continuations([continuation])) for context, continuation in pairs)

    def choose(
        self, questions: Iterable[tuple[Content, Sequence[Continuation]]], by: Measure = "sum"
    ) -> list[Completion]:
        """Score several continuations of one context: `scores` has an entry for each, in their order.

        `choice` is the index of the most likely: by its logprob, or by that per token or per character. The context is
        computed once.
        """
        return self._read((context, continuations(choices, by)) for context, choices in questions)

    def rolling(self, texts: Iterable[str | list[int]]) -> list[Completion]:
        """Score whole texts; `scores` has one entry, which covers every token of the text once.

        The first token follows the model's beginning-of-sequence token, or else its end-of-sequence token. A text
        longer than the context is read in windows, each token after as many others as fit.
        """
        return self._read((text, Rolling()) for text in texts)

    def embed(self, prompts: Iterable[Content], pooling: Pooling = "mean", normalize: bool = True) -> list[Completion]:
        """Embed each prompt: the mean of its final hidden states, or that of the last or first token alone.

        normalize: to length 1.
        """
        return self._read((content, Pooled(pooling, normalize)) for content in prompts)

    def _read(self, items: Iterable[tuple[Content, Read]]) -> list[Completion]:
        prompts = (Prompt(index, [content], read=read) for index, (content, read) in enumerate(items))
        return sorted(self.run_prompts(prompts), key=lambda completion: completion.index)

    @property
    def model_facts(self) -> ModelFacts:
        """See `Answerer`."""
        chat = self._assembly.chat
        template = chat.source if chat else None
        return ModelFacts((self.model_name,), self._tokenizer, template, self.default_params)

    def stats(self) -> EngineStats:
        """Counters since the model was loaded: of tokens (prompts, answers, drafts), steps and preemptions."""
        return self._engine.stats

    def parts(self) -> EngineParts:
        """Return the components, for a caller with its own loop, which excludes `run_prompts`."""
        return EngineParts(
            self._engine,
            self._preparer,
            self._assembly.tokenizer,
            self._assembly.chat,
            self._assembly.limits,
            self.default_params,
            self._max_num_seqs,
        )

    # -- the loop under it --------------------------------------------------------------------------------------

    def run_prompts(self, prompts: Iterable[Prompt]) -> Generator[Completion, None, None]:
        """Answer prompts in any order. `prompts` is read in a thread, a bounded number ahead of the engine.

        Closing the iterator stops the thread and drops what is running. One run at a time.
        """
        if self._running:
            raise UsageError("this LLM is already running: finish or close the other stream first")
        self._running = True
        stream = Stream(prompts, self._preparer, self._engine, self._tokenizer, self._max_num_seqs)
        try:
            yield from stream.completions()
        finally:
            stream.close()
            self._running = False

    # -- construction -------------------------------------------------------------------------------------------

    def _setup(self, assembly: Assembly, engine: EngineSpec, defaults: Defaults) -> None:
        self.default_params = SamplingParams.from_mapping(defaults.sampling, assembly.defaults)
        self._seed = defaults.seed
        self._assembly = assembly
        self._tokenizer = assembly.tokenizer
        chat = assembly.chat, defaults.chat_kwargs, defaults.special_tokens
        self._preparer = Preparer(assembly.tokenizer, assembly.limits, self.default_params, *chat)
        self._max_num_seqs = engine.max_num_seqs
        self._engine = make_engine(assembly.pool, assembly.runner, engine, assembly.max_draft_rows)


def make_engine(pool: BlockPool, runner: StepRunner, spec: EngineSpec, max_draft_rows: int) -> Engine:
    """Return an engine with nothing in it yet. `max_draft_rows` is a fact of the backend: see `Scheduler`."""
    limits = spec.max_num_seqs, spec.max_step_tokens, spec.speculative_tokens
    return Engine(Scheduler(pool, *limits, max_draft_rows=max_draft_rows), runner)


def _engine_spec(options: dict[str, Any]) -> EngineSpec:
    try:
        return parse_section(EngineSpec, options, lambda _: "LLM")
    except SpecError as error:
        raise UsageError(str(error)) from None


def _prompt(index: int, content: Content, params: SamplingParams | None, key: int) -> Prompt:
    if params is _MISSING:
        raise UsageError(f"there are fewer sampling_params than prompts: prompt {index} has none")
    return Prompt(index, [content], params, key)
