"""A backend on a GPU for tests that hold their tensors on the CPU.

Every call copies the memory of its tensors to the device, with strides and with whatever views share it, and back if
the call changed it. What only the backend reads (step index, packed matrices) stays on the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

_OPAQUE = {"prepare", "pack", "pack_gated", "pack_rows", "argmax_bounds", "layer_stack", "allocate_kv"}


class OnDevice:
    """Calls the methods of `target`, a backend or its step kernels, with tensors on `device`."""

    def __init__(self, target: Any, device: str) -> None:
        self._target = target
        self._device = device

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if name == "steps":
            return OnDevice(value, self._device)
        return partial(self._call, name, value) if callable(value) else value

    def _call(self, name: str, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        memory = _CopiedMemory(self._device)
        result = method(*memory.there(arguments), **memory.there(named))
        memory.bring_back()
        return result if name in _OPAQUE else memory.here(result)


class _CopiedMemory:
    """Storages of one call on both sides, and the tensors that were made of them."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._storages: dict[int, tuple[Tensor, Tensor]] = {}  # address on the CPU → bytes here, bytes there
        self._originals: dict[int, Tensor] = {}  # id of a tensor there → tensor here
        self._tensors: list[Tensor] = []  # keeps their ids from being used again

    def there(self, value: Any) -> Any:
        """Return the value with its CPU tensors on the device."""
        if isinstance(value, Tensor):
            return self._tensor_there(value) if value.device.type == "cpu" else value
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if field.init]
            return dataclasses.replace(value, **{name: self.there(getattr(value, name)) for name in names})
        return _mapped(self.there, value)

    def here(self, value: Any) -> Any:
        """Return a result with its tensors on the CPU: the caller's own tensor where the call returned an argument."""
        if not isinstance(value, Tensor):
            return _mapped(self.here, value)
        if id(value) in self._originals:
            return self._originals[id(value)]
        for bytes_here, bytes_there in self._storages.values():
            if value.numel() and value.untyped_storage().data_ptr() == bytes_there.untyped_storage().data_ptr():
                return _tensor_in(bytes_here, value)
        return value.cpu()

    def bring_back(self) -> None:
        """Copy what the call changed."""
        for bytes_here, bytes_there in self._storages.values():
            after = bytes_there.cpu()
            if not torch.equal(after, bytes_here):
                bytes_here.copy_(after)

    def _tensor_there(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr() or -id(storage)
        if key not in self._storages:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[key] = here, here.clone().to(self._device)
        moved = _tensor_in(self._storages[key][1], tensor)
        self._originals[id(moved)] = tensor
        self._tensors.append(moved)
        return moved


def _tensor_in(storage: Tensor, like: Tensor) -> Tensor:
    """Return a tensor in other memory, given as bytes, at the place of `like` in its own."""
    empty = torch.empty(0, dtype=like.dtype, device=storage.device)
    return empty.set_(storage.untyped_storage(), like.storage_offset(), like.shape, like.stride())


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, dict):
        return {key: change(one) for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    if isinstance(value, list | tuple):
        return type(value)(map(change, value))
    return value
