"""Sentencepiece vocabularies as tokenizers of the `tokenizers` library, with the same ids.

Source: Kudo and Richardson 2018, and src/bpe_model.cc of google/sentencepiece: the adjacent pair that forms the piece
with the best score is merged first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter

from tokenizers import Regex, decoders, normalizers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE, Unigram

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
_LONGEST_PIECE = 4096


@dataclass(frozen=True)
class SpaceRules:
    """White-space handling before a text is split into pieces.

    prefix: add a space before the text and after each special token in it, as llama.cpp does, and as sentencepiece does
    with the texts in between. collapse: reduce runs of spaces to one and strip both ends.
    """

    prefix: bool = True
    collapse: bool = False


@dataclass(frozen=True)
class PieceTable:
    """A vocabulary by id: text, type and score (a log probability, or a negative rank) of every piece."""

    texts: Sequence[str]
    types: Sequence[int]
    scores: Sequence[float]

    @property
    def unknown(self) -> int | None:
        return next((number for number, kind in enumerate(self.types) if kind == UNKNOWN), None)


def bpe_tokenizer(pieces: PieceTable, rules: SpaceRules, charsmap: bytes = b"") -> RustTokenizer:
    """Return BPE with merges in the order of scores, ▁ for spaces, and byte fallback.

    charsmap: sentencepiece's compiled normalization table, empty for none.
    """
    vocab = {text: number for number, text in enumerate(pieces.texts)}
    unknown = None if pieces.unknown is None else pieces.texts[pieces.unknown]
    model = BPE(vocab, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    return _framed(RustTokenizer(model), rules, charsmap)


def unigram_tokenizer(pieces: PieceTable, rules: SpaceRules, charsmap: bytes, byte_fallback: bool) -> RustTokenizer:
    """Return a unigram tokenizer, which finds the most likely segmentation by the scores."""
    scored = list(zip(pieces.texts, pieces.scores, strict=True))
    model = Unigram(scored, unk_id=pieces.unknown, byte_fallback=byte_fallback)
    return _framed(RustTokenizer(model), rules, charsmap)


def check_lengths(texts: Iterable[str | bytes]) -> None:
    """Check the lengths of pieces, because every split of a piece is tried.

    Raises ValueError for an implausible one.
    """
    longest = max(map(len, texts), default=0)
    if longest > _LONGEST_PIECE:
        raise ValueError(f"it has a piece of {longest} characters")


def _framed(rust: RustTokenizer, rules: SpaceRules, charsmap: bytes) -> RustTokenizer:
    """Add normalization, the escaping of spaces, and the decoder."""
    steps: list[normalizers.Normalizer] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if rules.collapse:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.prefix:
        steps.append(normalizers.Prepend("▁"))
    rust.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if rules.prefix else []
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return rust


def _merges(pieces: PieceTable) -> list[tuple[str, str]]:
    """Return every pair of pieces that forms a third, ordered by the third's score, best first.

    Pieces that are split off first (control, user-defined) and byte pieces are never merged.
    """
    parts = {
        text for text, kind in zip(pieces.texts, pieces.types, strict=False) if kind not in (CONTROL, UNKNOWN, BYTE)
    }
    check_lengths(pieces.texts)
    ranked: list[tuple[float, tuple[str, str]]] = []
    for text, kind, score in zip(pieces.texts, pieces.types, pieces.scores, strict=False):
        if kind in (CONTROL, UNKNOWN, BYTE, USER_DEFINED):
            continue
        ranked.extend(
            (-score, (text[:cut], text[cut:]))
            for cut in range(len(text) - 1, 0, -1)
            if text[:cut] in parts and text[cut:] in parts
        )
    ranked.sort(key=itemgetter(0))  # stable: among the splits of one piece, the longest first half comes first
    return [pair for _, pair in ranked]
