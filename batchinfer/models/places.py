"""Places of weights: for every parameter of a decoder the checkpoint tensors that it is read from, and their cuts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from torch import nn

from batchinfer.layers.linear import Linear
from batchinfer.layers.norm import RMSNorm
from batchinfer.models.checkpoint import TensorSlice
from batchinfer.models.config import ModelConfig
from batchinfer.models.cuts import WHOLE, Cut, ParameterCut, parameter_cut
from batchinfer.models.decoder import Decoder

EMBEDDING = "embed_tokens.weight"  # after the prefix of the text model
HEAD = "lm_head.weight"

_SAME_FOR_ALL = {
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.down": "mlp.down_proj",
}


class WeightPlace(NamedTuple):
    """Parameter `kind` of a decoder's `module`, and the slices of checkpoint tensors that are stacked in it."""

    module: str
    kind: Literal["weight", "bias"]
    slices: tuple[TensorSlice, ...]

    @property
    def at_an_end(self) -> bool:
        """Return True for the embedding and the LM head."""
        return self.module in ("embedding", "head")


def places_of(decoder: Decoder, config: ModelConfig, prefix: str, cut: Cut = WHOLE) -> list[WeightPlace]:
    """Return the places of all parameters of one rank's decoder, in the order of the computation.

    `config` is that of the whole model; `prefix` is what the names of the text model's weights begin with.
    """
    places = [_place("embedding", "weight", [f"{prefix}{EMBEDDING}"], parameter_cut("embedding", config, cut))]
    for number, layer in enumerate(decoder.layers):
        for module, kind in _parameters(layer):
            theirs = _tensor_names(module, config)
            names = [f"{prefix}layers.{number}.{name}.{kind}" for name in theirs]
            places.append(_place(f"layers.{number}.{module}", kind, names, parameter_cut(module, config, cut)))
    places.append(_place("norm", "weight", [f"{prefix}norm.weight"], parameter_cut("norm", config, cut)))
    if decoder.head is not None:
        places.append(_place("head", "weight", [HEAD], parameter_cut("head", config, cut)))
    return places


def _parameters(layer: nn.Module) -> Iterator[tuple[str, Literal["weight", "bias"]]]:
    for name, module in layer.named_modules():
        if isinstance(module, Linear | RMSNorm):
            yield name, "weight"
        if isinstance(module, Linear) and module.bias is not None:
            yield name, "bias"


def _tensor_names(module: str, config: ModelConfig) -> tuple[str, ...]:
    family = config.family
    return family.stacks.get(module) or (family.norms.get(module) or _SAME_FOR_ALL[module],)


def _place(module: str, kind: Literal["weight", "bias"], names: Sequence[str], cut: ParameterCut) -> WeightPlace:
    is_matrix = kind == "weight" and not module.endswith("norm")
    columns = cut.columns if is_matrix else None
    width = () if columns is None else (columns.whole,)
    kept = None if columns is None else columns.kept
    if len(names) == len(cut.rows):
        slices = [
            TensorSlice(name, (rows.whole, *width), (rows.kept,), kept, rows.zeros)
            for name, rows in zip(names, cut.rows, strict=True)
        ]
    else:  # the maps are stacked in the checkpoint as well
        [name], ranges, first = names, [], 0
        for rows in cut.rows:
            ranges.append(range(first + rows.kept.start, first + rows.kept.stop))
            first += rows.whole
        slices = [TensorSlice(name, (first, *width), tuple(ranges), kept)]
    return WeightPlace(module, kind, tuple(slices))
