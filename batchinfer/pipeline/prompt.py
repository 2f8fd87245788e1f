"""A prompt on its way to the engine: as it is given (`Prompt`), and content by content as it runs (`Prepared`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from batchinfer.errors import RowError
from batchinfer.pipeline.encoding import Content, PromptOptions
from batchinfer.pipeline.scoring import Read
from batchinfer.request import Request, SamplingParams
from batchinfer.text.detokenize import StopStrings

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Prompt:
    """Prompt of one completion, which has the same `index`.

    contents: each is text as it is, token ids, or chat messages. Mostly there is one; several are answered as prompts
    of their own, and one completion joins their answers (see `Completion.per_content`).
    params: None means the model's and job's defaults.
    key: seeds the random numbers of its samples.
    error: a prompt in error has no contents and becomes an error completion, so a stream has one answer per row.
    read: the prompt is scored or embedded, nothing is generated, and `params` do not matter.
    """

    index: int
    contents: Sequence[Content]
    params: SamplingParams | None = None
    key: int = 0
    error: RowError | None = None
    read: Read | None = None
    options: PromptOptions | None = None


@dataclass(frozen=True, slots=True)
class PromptContent:
    """Content of a prompt, the `place`-th of `count`; a prompt without contents has one that is None."""

    prompt: Prompt
    content: Content | None
    place: int
    count: int

    @property
    def key(self) -> int:
        """Return the key that seeds the random numbers of this content's samples."""
        return mix(self.prompt.key, self.place) if self.place else self.prompt.key


def contents_of(prompts: Iterable[Prompt]) -> Iterator[PromptContent]:
    """Yield the contents of all prompts, in order."""
    for prompt in prompts:
        contents = prompt.contents or (None,)
        for place, content in enumerate(contents):
            yield PromptContent(prompt, content, place, len(contents))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A content that the engine can run: one request per sample, all with the same prompt ids.

    With `read`, one request per continuation, or per window of a long text. `place` and `count`: see `PromptContent`.
    """

    index: int
    ids: list[int]
    params: SamplingParams
    requests: list[Request]
    stop: StopStrings | None
    read: Read | None = None
    place: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True)
class Refused:
    """A content that cannot run; `ids` as far as they are known. `place` and `count`: see `PromptContent`."""

    index: int
    ids: list[int]
    error: RowError
    place: int = 0
    count: int = 1


def mix(key: int, number: int) -> int:
    """Return the `number`-th 64-bit key derived from `key` (splitmix64's finaliser; Steele, Lea, Flood 2014)."""
    z = (key + 0x9E3779B97F4A7C15 * (number + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
