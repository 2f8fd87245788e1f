"""Weights from disk into a decoder, matrix by matrix: each is read, packed on its device and freed before the next.

State: none but the decoder that is built. Memory: what is packed already, one matrix in the dtype of activations (which
is the packed one, where a backend computes with it as it is), and on the host buffers of megabytes. Failure: a
checkpoint that does not go with its configuration raises ModelError before the first weight is read, with file, tensor
and shapes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from batchinfer.errors import ModelError, suggest
from batchinfer.layers.linear import Linear
from batchinfer.log import log
from batchinfer.models.checkpoint import Checkpoint, TensorSlice
from batchinfer.models.config import ModelConfig, load_config, parse_config
from batchinfer.models.cuts import WHOLE, Cut, check_cut, rank_config
from batchinfer.models.decoder import Decoder
from batchinfer.models.gguf import GGUFFile
from batchinfer.models.places import EMBEDDING, HEAD, WeightPlace, places_of
from batchinfer.models.precision import EXACT, WeightPrecision
from batchinfer.models.safetensors import SafetensorsFiles
from batchinfer.models.schemes import SCHEMES, GGUFScheme, PlainScheme, Scheme
from batchinfer.ops.backend import Backend
from batchinfer.ops.choose import load_backend
from batchinfer.ops.staging import Staging, make_staging

_NEVER_NEEDED = ".rotary_emb.inv_freq"  # old Llama files hold what follows from the config
_COMPARED_NUMBERS = 1 << 22  # at once, of two tensors


class _WeightSource(NamedTuple):
    """Checkpoint of a model, with the scheme and the prefix of names that it is read with."""

    path: Path
    config: ModelConfig
    checkpoint: Checkpoint
    scheme: Scheme
    prefix: str


def load_decoder(
    path: Path,
    precision: WeightPrecision = EXACT,
    max_model_len: int | None = None,
    backend: Backend | None = None,
    cut: Cut = WHOLE,
    staging: Staging | None = None,
) -> Decoder:
    """Load a decoder from a directory with config.json and safetensors, or from a .gguf file. Raises ModelError.

    `max_model_len` shortens the context: decoder.config.context_tokens. `backend` None: the best there is here. With
    `cut` the decoder holds one rank's share of the weights, and its config one rank's sizes. `staging`: the way of the
    weights to the backend's device; None: the device's usual one.
    """
    backend = backend or load_backend()
    keep_blocks = precision == EXACT and not backend.capabilities.dtype_of_activations
    source = _open_source(path, staging or make_staging(backend.device), keep_blocks)
    config = _shortened(source.config, max_model_len)
    check_cut(config, cut, str(path))
    decoder = _empty(rank_config(config, cut), precision.activations.dtype, backend)
    places = places_of(decoder, config, source.prefix, cut)
    _check(source, places)
    loader = WeightLoader(decoder, source, precision)
    for place in places:
        loader.load_place(place)
    decoder.build_stack()
    return decoder.eval()


def _open_source(path: Path, staging: Staging, keep_blocks: bool) -> _WeightSource:
    if path.suffix == ".gguf":
        gguf = GGUFFile(path, staging)
        config = parse_config(gguf.config_dict(), str(path))
        return _WeightSource(path, config, gguf, GGUFScheme(gguf, keep_blocks), config.family.prefixes[0])
    config = load_config(path)
    files = SafetensorsFiles(path, staging)
    prefix = _prefix(config, files.stored)
    if config.tied and _own_head(path, files, prefix):
        config = replace(config, tied=False)
    return _WeightSource(path, config, files, SCHEMES[config.quant_method](files), prefix)


def _shortened(config: ModelConfig, max_model_len: int | None) -> ModelConfig:
    if max_model_len is None:
        return config
    if max_model_len > config.context_tokens:
        raise ModelError(
            f"max_model_len {max_model_len} is above the model's context of {config.context_tokens} tokens"
        )
    return replace(config, context_tokens=max_model_len)


def _empty(config: ModelConfig, dtype: torch.dtype, backend: Backend) -> Decoder:
    """Build a decoder with uninitialised norms and biases, and without matrices."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # not first on the meta device: leaving it imports sympy, 0.4 s
        with backend.device:
            return Decoder(backend, config)
    finally:
        torch.set_default_dtype(before)


def _prefix(config: ModelConfig, names: Collection[str]) -> str:
    """Return what the names of the text model's weights begin with: nothing in files saved from the base class."""
    prefixes = config.family.prefixes
    bare = "" if EMBEDDING in names else prefixes[0]
    return next((p for p in prefixes if any(name.startswith(p) for name in names)), bare)


def _own_head(path: Path, files: SafetensorsFiles, prefix: str) -> bool:
    """Return True if the files hold an LM head that is not the embedding, although the configuration ties the two.

    The file is right then: training went on after somebody untied them, or a merge did not keep them equal.
    """
    names = f"{prefix}{EMBEDDING}", HEAD
    shapes = {files.stored[name].shape for name in names if name in files.stored}
    if not all(name in files.stored for name in names) or len(shapes) > 1 or _equal(files, *names):
        return False
    log.warning(
        "tie_word_embeddings is true, but the file's lm_head.weight is not the embedding: the file's head is used",
        model=str(path),
    )
    return True


def _equal(files: SafetensorsFiles, name: str, other: str) -> bool:
    """Return True if two matrices of one shape hold the same numbers; False if a format is not a float's."""
    scheme, shape = PlainScheme(files), files.stored[name].shape
    for first in range(0, shape[0], step := max(1, _COMPARED_NUMBERS // shape[1])):
        rows = range(first, min(first + step, shape[0]))
        slices = [TensorSlice(each, shape, (rows,), range(shape[1])) for each in (name, other)]
        for part in slices:
            scheme.check(part, files.stored[part.name])
        mine, theirs = (scheme.read_floats([part], torch.empty(len(rows), shape[1])) for part in slices)
        if not torch.equal(mine, theirs):
            return False
    return True


def _check(source: _WeightSource, places: list[WeightPlace]) -> None:
    """Raise ModelError for tensors that are missing, surplus, of another shape or of a format that is not read."""
    stored = source.checkpoint.stored
    wanted: dict[str, tuple[int, ...]] = {}
    for part in (part for place in places for part in place.slices):
        tensors = {part.name: part.shape} if part.columns is None else source.scheme.tensors(part)
        for name in tensors.keys() & stored.keys():
            _check_shape(source, name, tensors[name])
        if part.name in stored:
            source.scheme.check(part, stored[part.name])
        wanted |= tensors
    _check_surplus(source, wanted)
    missing = [name for name in wanted if name not in stored]
    if missing:
        first, more = missing[0], f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        architecture = source.config.architecture
        raise ModelError(f"{source.path}: {first} {list(wanted[first])}{more} of {architecture} is missing")


def _check_surplus(source: _WeightSource, wanted: dict[str, tuple[int, ...]]) -> None:
    for name, (file, shape, _) in source.checkpoint.stored.items():
        if name in wanted or name.startswith(source.config.family.ignored) or name.endswith(_NEVER_NEEDED):
            continue
        if name == HEAD and source.config.tied:  # the embedding once more: see _own_head
            _check_shape(source, HEAD, wanted[f"{source.prefix}{EMBEDDING}"])
            continue
        near = suggest(name, wanted)
        raise ModelError(f"{file}: {name} {list(shape)} has no place in {source.config.architecture}{near}")


def _check_shape(source: _WeightSource, name: str, wanted: tuple[int, ...]) -> None:
    file, shape, _ = source.checkpoint.stored[name]
    if shape != wanted:
        raise ModelError(
            f"{file}: {name} has shape {list(shape)}, but the model's configuration asks for {list(wanted)}"
        )


class WeightLoader:
    """Fills a decoder. Holds one matrix at a time: the decoder keeps the packed form alone."""

    def __init__(self, decoder: Decoder, source: _WeightSource, precision: WeightPrecision) -> None:
        self._decoder = decoder
        self._source = source
        self._vectors = PlainScheme(source.checkpoint)
        self._precision = precision

    def load_place(self, place: WeightPlace) -> None:
        """Read a parameter; pack it if it is a matrix."""
        module = self._decoder.get_submodule(place.module)
        if isinstance(module, Linear) and place.kind == "weight":
            wanted = self._precision.ends if place.at_an_end else self._precision.layers
            matrix = self._source.scheme.read_matrix(place.slices, lambda: self._empty_matrix(module))
            module.pack_weight(matrix, wanted)
        else:
            self._vectors.read_floats(place.slices, module.get_parameter(place.kind))

    def _empty_matrix(self, linear: Linear) -> Tensor:
        shape = linear.out_features, linear.in_features
        return torch.empty(shape, dtype=self._precision.activations.dtype, device=self._decoder.backend.device)
