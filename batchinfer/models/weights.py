"""Weights from disk straight into the decoder's parameters: one tensor in memory at a time, whatever the format."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from batchinfer_kernels.formats import BlockMatrix, Precision, stacked_blocks
from safetensors import SafetensorError, safe_open
from torch import Tensor

from batchinfer.errors import ModelError, suggest
from batchinfer.layers.linear import Linear, StackedLinear
from batchinfer.log import log
from batchinfer.models.config import ModelConfig, load_config, parse_config
from batchinfer.models.decoder import Decoder
from batchinfer.models.file_kind import said
from batchinfer.models.gguf import GGUFFile
from batchinfer.models.json_file import read_json
from batchinfer.models.precision import EXACT, WeightPrecision
from batchinfer.ops.backend import Backend
from batchinfer.ops.choose import load_backend
from batchinfer.ops.resources import HOST

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_EMBEDDING = "embed_tokens.weight"  # after the prefix of the text model
_HEAD = "lm_head.weight"
_NEVER_NEEDED = ".rotary_emb.inv_freq"  # old Llama files hold what follows from the config


def load_decoder(
    path: Path,
    precision: WeightPrecision = EXACT,
    max_model_len: int | None = None,
    backend: Backend | None = None,
) -> Decoder:
    """Load a decoder from a directory with config.json and safetensors, or from a .gguf file. Raises ModelError.

    `max_model_len` shortens the context: decoder.config.context_tokens. `backend` None: the best there is here.
    """
    backend = backend or load_backend()
    if path.suffix == ".gguf":
        gguf = GGUFFile(path)
        config = _shortened(parse_config(gguf.config_dict(), str(path)), max_model_len)
        decoder = _empty(config, precision.activations.dtype, backend)
        filler = WeightLoader(decoder, config.family.prefixes[0], path)
        weights = gguf.weights_in_blocks() if precision == EXACT else gguf.weights()
        filler.fill((name, path, weight) for name, weight in weights)
    else:
        config = _shortened(load_config(path), max_model_len)
        shapes = _safetensors_shapes(path)
        if config.tied and _own_head(path, shapes, _prefix(config, shapes)):
            config = replace(config, tied=False)
        decoder = _empty(config, precision.activations.dtype, backend)
        filler = WeightLoader(decoder, _prefix(config, shapes), path)
        filler.check(shapes)
        filler.fill(_read_safetensors(list(dict.fromkeys(file for file, _ in shapes.values()))))
    decoder.pack(precision)
    return decoder.eval()


def _shortened(config: ModelConfig, max_model_len: int | None) -> ModelConfig:
    if max_model_len is None:
        return config
    if max_model_len > config.context_tokens:
        raise ModelError(
            f"max_model_len {max_model_len} is above the model's context of {config.context_tokens} tokens"
        )
    return replace(config, context_tokens=max_model_len)


def _empty(config: ModelConfig, dtype: torch.dtype, backend: Backend) -> Decoder:
    """Memory that nothing has touched yet: the weights are its first and only content."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # not first on the meta device: leaving it imports sympy, 0.4 s
        with backend.device:
            return Decoder(backend, config)
    finally:
        torch.set_default_dtype(before)


def _prefix(config: ModelConfig, names: Collection[str]) -> str:
    """What the names of the text model's weights begin with: nothing in a file that was saved from the base class."""
    prefixes = config.family.prefixes
    bare = "" if _EMBEDDING in names else prefixes[0]
    return next((p for p in prefixes if any(name.startswith(p) for name in names)), bare)


def _own_head(path: Path, shapes: Mapping[str, tuple[Path, tuple[int, ...]]], prefix: str) -> bool:
    """True if the files hold an LM head that is not the embedding, although the configuration ties the two.

    The file is right then: training went on after somebody untied them, or a merge did not keep them equal.
    """
    embedding, head = shapes.get(f"{prefix}{_EMBEDDING}"), shapes.get(_HEAD)
    if embedding is None or head is None or embedding[1] != head[1]:
        return False
    with _open(embedding[0]) as first, _open(head[0]) as second:
        if torch.equal(first.get_tensor(f"{prefix}{_EMBEDDING}"), second.get_tensor(_HEAD)):
            return False
    log.warning(
        "tie_word_embeddings is true, but the file's lm_head.weight is not the embedding: the file's head is used",
        model=str(path),
    )
    return True


class _TensorPlace(NamedTuple):
    """What a weight fills: rows of a parameter. If that is a matrix: whose, and the names of its parts."""

    rows: Tensor
    linear: Linear | None = None
    names: tuple[str, ...] = ()


def _places(decoder: Decoder, prefix: str) -> dict[str, _TensorPlace]:
    """Hugging Face's name of every weight → where it belongs."""
    family = decoder.config.family
    name = f"{prefix}{_EMBEDDING}"
    places = {
        name: _TensorPlace(decoder.embedding.weight, decoder.embedding, (name,)),
        f"{prefix}norm.weight": _TensorPlace(decoder.norm.weight),
    }
    if decoder.head is not None:
        places[_HEAD] = _TensorPlace(decoder.head.weight, decoder.head, (_HEAD,))
    for ours, parameter in decoder.layers.named_parameters():
        layer, _, path = ours.partition(".")
        module, _, kind = path.rpartition(".")
        owner = decoder.layers.get_submodule(f"{layer}.{module}")
        pieces: tuple[Tensor, ...] = (parameter,)
        if module in family.stacks:
            theirs = family.stacks[module]
            if len(theirs) > 1:
                assert isinstance(owner, StackedLinear)
                pieces = torch.split(parameter, list(owner.parts))
        else:
            theirs = (family.norms.get(module) or _SAME_FOR_ALL[module],)
        names = tuple(f"{prefix}layers.{layer}.{name}.{kind}" for name in theirs)
        linear = owner if isinstance(owner, Linear) and parameter is owner.weight else None
        places |= {name: _TensorPlace(piece, linear, names) for name, piece in zip(names, pieces, strict=True)}
    return places


_SAME_FOR_ALL = {
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.down": "mlp.down_proj",
}


class WeightLoader:
    """Copies weights to where they belong, and knows which are missing, surplus or of the wrong shape."""

    def __init__(self, decoder: Decoder, prefix: str, path: Path) -> None:
        self._path = path
        self._places = _places(decoder, prefix)
        self._blocks: dict[str, BlockMatrix] = {}  # of matrices whose other parts are not there yet
        self._architecture = decoder.config.architecture
        self._ignored = decoder.config.family.ignored
        # files of models with tied embeddings may hold the matrix twice (see _own_head)
        self._tied: Tensor | None = decoder.embedding.weight if decoder.head is None else None

    def check(self, shapes: dict[str, tuple[Path, tuple[int, ...]]]) -> None:
        """Before anything is read: name → file and shape."""
        for name, (file, shape) in shapes.items():
            self._target(name, file, shape)
        self._complain_of_missing(set(shapes))

    def fill(self, weights: Iterable[tuple[str, Path, Tensor | BlockMatrix]]) -> None:
        done = set()
        for name, file, weight in weights:
            target = self._target(name, file, tuple(weight.shape))
            if target is None or (name == _HEAD and self._tied is not None):
                continue
            if isinstance(weight, BlockMatrix):
                self._put_blocks(name, weight)
                done.add(name)
                continue
            if not weight.dtype.is_floating_point:
                raise ModelError(f"{file}: {name} holds {weight.dtype}, not floating-point numbers")
            target.copy_(weight)
            done.add(name)
        self._complain_of_missing(done)
        for name, blocks in self._blocks.items():  # what the other parts of a stack do not go with
            self._places[name].rows.copy_(blocks.float())

    def _put_blocks(self, name: str, blocks: BlockMatrix) -> None:
        """A matrix is kept in blocks where all that it is stacked of came in blocks, of one kind."""
        self._blocks[name] = blocks
        _, linear, names = self._places[name]
        if linear is None or not all(part in self._blocks for part in names):
            return
        whole = stacked_blocks([self._blocks[part] for part in names])
        if whole is not None:
            linear.pack_weight(whole, Precision.FLOAT32)
            for part in names:
                del self._blocks[part]

    def _target(self, name: str, file: Path, shape: tuple[int, ...]) -> Tensor | None:
        """None: not needed. Raises ModelError for a weight that has no place, or another shape than its place."""
        place = self._places.get(name)
        target = None if place is None else place.rows
        if name == _HEAD and self._tied is not None:
            target = self._tied
        if target is None:
            if name.startswith(self._ignored) or name.endswith(_NEVER_NEEDED):
                return None
            near = suggest(name, self._places)
            raise ModelError(f"{file}: {name} {list(shape)} has no place in {self._architecture}{near}")
        if tuple(target.shape) != shape:
            raise ModelError(
                f"{file}: {name} has shape {list(shape)}, but the model's configuration asks for {list(target.shape)}"
            )
        return target

    def _complain_of_missing(self, there: set[str]) -> None:
        missing = [name for name in self._places if name not in there]
        if missing:
            shape = list(self._places[missing[0]].rows.shape)
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(f"{self._path}: {missing[0]} {shape}{more} of {self._architecture} is missing")


def _safetensors_shapes(path: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Of every tensor: file and shape, from the files' headers alone."""
    shapes = {}
    for file in _safetensors_files(path):
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                shapes[name] = (file, tuple(tensors.get_slice(name).get_shape()))
    return shapes


def _safetensors_files(path: Path) -> list[Path]:
    if (path / _INDEX).exists():
        try:
            names = sorted({str(name) for name in read_json(path / _INDEX)["weight_map"].values()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path / _INDEX} is not a safetensors index: {error!r}") from None
    elif (path / _ONE_FILE).exists():
        names = [_ONE_FILE]
    else:
        raise ModelError(f"{path} holds neither {_ONE_FILE} nor {_INDEX}; other formats of weights are not read")
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{path / _INDEX} names {name}, which is not a file beside it")
        if not (path / name).is_file():
            raise ModelError(f"{path / _INDEX} names {name}, which is not there; download the model again")
    return [path / name for name in names]


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device=str(HOST))
    except (SafetensorError, OSError) as error:
        otherwise = f"is not a whole safetensors file: {error}; download it again"
        raise ModelError(f"{file} {said(file, otherwise)}") from None


def _read_safetensors(files: list[Path]) -> Iterator[tuple[str, Path, Tensor]]:
    """Tensors are views of the mapped file: nothing is in memory but the pages being copied."""
    for file in files:
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                yield name, file, tensors.get_tensor(name)
