"""Completions from what the engine finished: detokenizing, stop strings, scores and embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from batchinfer.errors import RowError
from batchinfer.pipeline.prompt import Prepared
from batchinfer.pipeline.scoring import Continuations, Pooled, best_choice, score_of
from batchinfer.request import Completion, CompletionOutput, Finished
from batchinfer.text.tokenizer import Tokenizer


class CompletionWriter:
    """Makes completions, with one call of the tokenizer for many of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def write_all(self, ended: Sequence[tuple[Prepared, list[Finished]]]) -> list[Completion]:
        """Return the completion of each content, from the answers to all of its requests."""
        texts = self._texts([answer for _, answers in ended for answer in answers if answer.error is None])
        return [self._completion(prepared, answers, texts) for prepared, answers in ended]

    def _completion(self, prepared: Prepared, answers: list[Finished], texts: dict[int, str]) -> Completion:
        """Join all samples, and the prompt's logprobs that the first of them read. Any error is the completion's."""
        error = next((answer.error for answer in answers if answer.error is not None), None)
        if error is not None:
            return Completion(prepared.index, prepared.ids, error=error)
        answers = sorted(answers, key=lambda answer: answer.request.request_id)
        if prepared.read is not None:
            return _reading(prepared, answers)
        outputs = []
        for answer in answers:
            text = self._cut_stop(prepared, answer, texts[answer.request.request_id])
            outputs.append(CompletionOutput(text, answer.token_ids, answer.finish_reason, answer.logprobs))
        first = answers[0]
        scored, cached = first.prompt_logprobs, first.cached_tokens
        return Completion(prepared.index, prepared.ids, outputs, prompt_logprobs=scored, cached_tokens=cached)

    def _texts(self, answers: list[Finished]) -> dict[int, str]:
        """Return request id → text."""
        texts: dict[int, str] = {}
        for skip in (True, False):
            same = [answer for answer in answers if answer.request.params.skip_special_tokens is skip]
            if same:
                decoded = self._tokenizer.decode_batch([_visible(answer) for answer in same], skip_special_tokens=skip)
                texts.update(zip((answer.request.request_id for answer in same), decoded, strict=True))
        return texts

    def _cut_stop(self, prepared: Prepared, answer: Finished, text: str) -> str:
        """Return the text up to the stop string that ended it."""
        if prepared.stop is None or answer.finish_reason != "stop" or answer.token_ids[-1] in answer.request.stop_ids:
            return text
        early = answer.token_ids[: prepared.params.min_tokens]  # a stop string that these complete does not count
        pieces = self._tokenizer.pieces(prepared.params.skip_special_tokens)
        return prepared.stop.cut(text, sum(len(pieces.push(token)) for token in early))


def _reading(prepared: Prepared, answers: list[Finished]) -> Completion:
    """Return scores or an embedding. answers: in the order of the requests."""
    if isinstance(prepared.read, Pooled):
        rows, hidden = answers[0].request.rows_read(), answers[0].hidden
        assert rows is not None and hidden is not None
        try:
            vector = prepared.read.vector(hidden, len(rows))
        except RowError as error:
            return Completion(prepared.index, prepared.ids, error=error)
        return Completion(prepared.index, prepared.ids, embedding=vector)
    readings = [answer.prompt_logprobs or [] for answer in answers]
    if not isinstance(prepared.read, Continuations):
        return Completion(prepared.index, prepared.ids, scores=[score_of(readings)])
    texts = [text if isinstance(text, str) else None for text in prepared.read.texts]
    scores = [score_of([reading], text) for reading, text in zip(readings, texts, strict=True)]
    return Completion(prepared.index, prepared.ids, scores=scores, choice=best_choice(scores, prepared.read.by))


def _visible(answer: Finished) -> list[int]:
    """Return the ids that become text: all but a stop token, unless it was asked for."""
    stopped = answer.finish_reason == "stop" and answer.token_ids[-1] in answer.request.stop_ids
    if stopped and not answer.request.params.include_stop_str_in_output:
        return answer.token_ids[:-1]
    return answer.token_ids
