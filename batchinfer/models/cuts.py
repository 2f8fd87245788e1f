"""Cuts of a model over ranks: which rows and columns of every parameter a rank holds.

Tensor parallelism after Megatron-LM (Shoeybi et al., 2019, arXiv:1909.08053): queries, keys and values are cut by
groups of a kv head and its query heads, gates and factors by feed-forward features, the projections back
(`attention.out`, `mlp.down`) by their input features, embedding and LM head by vocabulary rows. Norms are replicated,
except norms over all heads together, which are cut as the heads. Biases of projections back are replicated too: they
are added once, after the ranks' sum.

H query heads · K kv heads · D head size · F feed-forward size · V vocabulary · E hidden size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from batchinfer.errors import ModelError
from batchinfer.models.config import ModelConfig


class Cut(NamedTuple):
    """Rank `rank` of the `size` ranks that hold a model together. The default is the whole model."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> range:
        """Return this rank's range of `count` entries, a multiple of the size."""
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)


WHOLE = Cut()


class AxisCut(NamedTuple):
    """Range of an axis that a rank holds, of `whole` entries in the checkpoint. `zeros` entries follow as padding."""

    whole: int
    kept: range
    zeros: int = 0

    @property
    def length(self) -> int:
        """Return the entries that the rank's parameter has."""
        return len(self.kept) + self.zeros


class ParameterCut(NamedTuple):
    """Rows of a parameter, one AxisCut for each map that is stacked in it, and its columns if it is a matrix."""

    rows: tuple[AxisCut, ...]
    columns: AxisCut


def check_cut(config: ModelConfig, cut: Cut, where: str) -> None:
    """Raise ModelError, with numbers of ranks that would do, if the model cannot be cut over so many."""
    if not 0 <= cut.rank < cut.size:
        raise ModelError(f"rank {cut.rank} is not among the {cut.size} ranks of a model")
    if fits(config, cut.size):
        return
    attention, size = config.attention, config.mlp.size
    would_do = ", ".join(str(count) for count in range(1, attention.num_heads + 1) if fits(config, count))
    raise ModelError(
        f"{where}: {attention.num_heads} query heads, {attention.num_kv_heads} kv heads and {size} feed-forward "
        f"features cannot be cut over {cut.size} ranks; numbers that would do: {would_do}"
    )


def fits(config: ModelConfig, size: int) -> bool:
    """Return True if heads and feed-forward features are multiples of `size`; kv heads may be replicated evenly."""
    heads, kv_heads = config.attention.num_heads, config.attention.num_kv_heads
    return heads % size == 0 and config.mlp.size % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


def rank_config(config: ModelConfig, cut: Cut) -> ModelConfig:
    """Return the configuration of one rank's decoder: its heads, feed-forward features and vocabulary rows."""
    if cut == WHOLE:
        return config
    attention = replace(
        config.attention,
        num_heads=len(cut.share(config.attention.num_heads)),
        num_kv_heads=len(_kv_heads(config, cut)),
    )
    mlp = replace(config.mlp, size=len(cut.share(config.mlp.size)))
    return replace(config, attention=attention, mlp=mlp, vocab_size=_vocabulary(config, cut).length)


def parameter_cut(module: str, config: ModelConfig, cut: Cut) -> ParameterCut:
    """Return the cut of the parameters of `module`: a name within a decoder layer, or of the decoder itself.

    A bias or a norm has the rows alone.
    """
    return _CUTS.get(module, _replicated)(config, cut)


def _kv_heads(config: ModelConfig, cut: Cut) -> range:
    """Return the kv heads that the rank's query heads read; with more ranks than kv heads several hold the same one."""
    count = config.attention.num_kv_heads
    if cut.size <= count:
        return cut.share(count)
    head = cut.rank * count // cut.size
    return range(head, head + 1)


def _of_heads(heads: range, count: int, size: int) -> AxisCut:
    return AxisCut(count * size, range(heads.start * size, heads.stop * size))


def _queries(config: ModelConfig, cut: Cut) -> AxisCut:
    attention = config.attention
    return _of_heads(cut.share(attention.num_heads), attention.num_heads, attention.head_size)


def _keys(config: ModelConfig, cut: Cut) -> AxisCut:
    attention = config.attention
    return _of_heads(_kv_heads(config, cut), attention.num_kv_heads, attention.head_size)


def _features(config: ModelConfig, cut: Cut) -> AxisCut:
    return AxisCut(config.mlp.size, cut.share(config.mlp.size))


def _hidden(config: ModelConfig) -> AxisCut:
    return AxisCut(config.hidden_size, range(config.hidden_size))


def _vocabulary(config: ModelConfig, cut: Cut) -> AxisCut:
    """Every rank has as many rows: those beyond the vocabulary's end are zeros."""
    count = config.vocab_size
    each = -(-count // cut.size)
    kept = range(min(cut.rank * each, count), min((cut.rank + 1) * each, count))
    return AxisCut(count, kept, each - len(kept))


def _replicated(config: ModelConfig, cut: Cut) -> ParameterCut:
    return ParameterCut((_hidden(config),), _hidden(config))


def _qkv(config: ModelConfig, cut: Cut) -> ParameterCut:
    keys = _keys(config, cut)
    return ParameterCut((_queries(config, cut), keys, keys), _hidden(config))


def _gate_up(config: ModelConfig, cut: Cut) -> ParameterCut:
    features = _features(config, cut)
    return ParameterCut((features, features), _hidden(config))


def _qk_norm(heads: Callable[[ModelConfig, Cut], AxisCut]) -> Callable[[ModelConfig, Cut], ParameterCut]:
    def norm_cut(config: ModelConfig, cut: Cut) -> ParameterCut:
        size = config.attention.head_size
        rows = heads(config, cut) if config.attention.qk_norm == "projection" else AxisCut(size, range(size))
        return ParameterCut((rows,), _hidden(config))

    return norm_cut


def _ends(config: ModelConfig, cut: Cut) -> ParameterCut:
    return ParameterCut((_vocabulary(config, cut),), _hidden(config))


_CUTS: dict[str, Callable[[ModelConfig, Cut], ParameterCut]] = {
    "embedding": _ends,
    "head": _ends,
    "attention.qkv": _qkv,
    "attention.out": lambda config, cut: ParameterCut((_hidden(config),), _queries(config, cut)),
    "attention.q_norm": _qk_norm(_queries),
    "attention.k_norm": _qk_norm(_keys),
    "mlp.gate_up": _gate_up,
    "mlp.down": lambda config, cut: ParameterCut((_hidden(config),), _features(config, cut)),
}
"""Module → its cut. Modules that are not here are norms over the hidden size: replicated."""
