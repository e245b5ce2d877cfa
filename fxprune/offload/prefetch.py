"""Weights moved to a compute device part by part, and precision there.

The weights stay where they are, in memory or in files. What runs next is copied ahead, while the device is at work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx

from fxprune.errors import ArgumentError, PassError
from fxprune.graph.tensors import device_of, example_of, weights

__all__ = [
    "Carrier",
    "StreamCarrier",
    "at_place",
    "autocast",
    "carrier_to",
    "carrying",
    "check_device",
    "current_carrier",
    "has_bf16",
    "inputs_at_place",
    "narrowed",
    "place_of",
    "to_place",
]

_offered: ContextVar[Carrier | None] = ContextVar("offered", default=None)
_used: ContextVar[Carrier | None] = ContextVar("used", default=None)

_Key = tuple[int, int]
"""The identity of a tensor, and how often it was written to."""


class Carrier:
    """Copies weights to a device, some of them ahead.

    It holds what was copied ahead, and of what was asked for the last alone: whoever asks holds the rest.

    Args:
        device: where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._ahead: dict[_Key, tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {}
        self._last: tuple[_Key, torch.Tensor, torch.Tensor] | None = None

    def ahead(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy what is needed next; what was copied ahead before and is not among it is given up."""
        begun, self._ahead = self._ahead, {}
        for tensor in tensors:
            key = _key(tensor)
            if key not in self._ahead:
                self._ahead[key] = begun.pop(key) if key in begun else (tensor, self.begin(tensor.detach()))

    def carry(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors on the device; of one that is named twice, the same copy twice."""
        found: dict[_Key, torch.Tensor] = {}
        for tensor in tensors:
            key = _key(tensor)
            if key in found:
                continue
            if self._last is not None and self._last[0] == key:
                found[key] = self._last[2]
                continue
            self._last = None  # before another one is there
            begun = self._ahead.pop(key, None)
            found[key] = begun[1]() if begun is not None else self.begin(tensor.detach())()
            self._last = key, tensor, found[key]
        return [found[_key(tensor)] for tensor in tensors]

    def begin(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to copy a tensor; what is returned waits for the copy and gives it."""
        moved = tensor.to(self.device)
        return lambda: moved

    def close(self) -> None:
        """Give up all that is held."""
        self._ahead, self._last = {}, None


class StreamCarrier(Carrier):
    """Copies by way of memory that a GPU reads by itself, in a thread and a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)
        self._thread = ThreadPoolExecutor(1)

    def begin(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Read a tensor, from its file perhaps, in the thread; the device waits for it where it is used."""
        copying = self._thread.submit(self._copy, tensor)

        def finish() -> torch.Tensor:
            moved, copied = copying.result()
            now = torch.cuda.current_stream(self.device)
            now.wait_event(copied)
            moved.record_stream(now)
            return moved

        return finish

    def close(self) -> None:
        """End the thread as well."""
        super().close()
        self._thread.shutdown(cancel_futures=True)

    def _copy(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event]:
        held = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            return held.to(self.device, non_blocking=True), self._stream.record_event()


def carrier_to(device: Any, home: torch.device) -> Carrier | None:
    """Return what carries weights to a device; None where they are there, or no device is named.

    Args:
        device: as :func:`check_device` takes it.
        home: the device of the weights.
    """
    place = check_device(device)
    if place is None or place == home:
        return None
    return StreamCarrier(place) if place.type == "cuda" else Carrier(place)


def check_device(device: Any) -> torch.device | None:
    """Return a device with its number, None where none is named; refuse one that is not there.

    Raises:
        ArgumentError: torch does not know it, or this machine has none, or nothing can be computed there.
    """
    if device is None:
        return None
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArgumentError(
            f"device {device} cannot be used: {reason}", where="device", remedy="Leave it out to compute on the CPU"
        ) from error
    if place.type == "meta":
        raise ArgumentError("nothing can be computed on meta", where="device", remedy="Name a device that computes")
    return place


@contextmanager
def carrying(carrier: Carrier | None) -> Iterator[None]:
    """Offer a carrier to the passes that can compute where it carries weights to; close it in the end."""
    if carrier is None:
        yield
        return
    token = _offered.set(carrier)
    try:
        yield
    finally:
        _offered.reset(token)
        carrier.close()


@contextmanager
def at_place(wanted: bool) -> Iterator[None]:
    """Use the carrier that is offered, where one is and it is wanted; else compute where the weights are."""
    token = _used.set(_offered.get() if wanted else None)
    try:
        yield
    finally:
        _used.reset(token)


def current_carrier() -> Carrier | None:
    """The carrier in use; None where weights are read where they are."""
    return _used.get()


def place_of(graph_module: fx.GraphModule) -> torch.device:
    """The device that a graph runs on: the one that weights are carried to, else that of its weights."""
    carrier = _used.get()
    return device_of(graph_module) if carrier is None else carrier.device


def to_place(value: Any, place: torch.device) -> Any:
    """Return a value on a device, a tensor that is there already as it is."""
    return value.to(place) if isinstance(value, torch.Tensor) and value.device != place else value


def inputs_at_place(graph_module: fx.GraphModule, inputs: Mapping[str, Any]) -> list[Any]:
    """Return the inputs of a graph, in order, on the device that it runs on."""
    place = place_of(graph_module)
    return [example_of(value, lambda tensor: to_place(tensor, place)) for value in inputs.values()]


def _key(tensor: torch.Tensor) -> _Key:
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself, and not by way of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "xpu":
        return True
    can: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def narrowed(precision: str, graph_module: fx.GraphModule, trial: Callable[[], torch.Tensor], where: str) -> bool:
    """Whether products in runs of a graph are to be computed in bfloat16.

    Args:
        precision: ``float32`` for no; ``bf16``; or ``auto``, for where the device computes in it itself and the trial
            gives what is finite. Weights that are not all float32 stay what they are.
        graph_module: the graph.
        trial: runs it; called in a context in which products are narrow.
        where: the pass that asks.

    Raises:
        PassError: ``bf16`` was asked for, and an op of the graph refuses what comes of it.
    """
    device = place_of(graph_module)
    floats = [tensor.dtype for _, tensor in weights(graph_module) if tensor.is_floating_point()]
    if precision == "float32" or any(dtype != torch.float32 for dtype in floats):
        return False
    if precision == "auto" and not has_bf16(device):
        return False
    try:
        with torch.no_grad(), autocast(device, True):
            return bool(trial().isfinite().all())
    except torch.OutOfMemoryError:  # a RuntimeError, too; with float32 there would be less yet
        raise
    except RuntimeError as error:  # an op that takes two tensors of one type, of which one was narrowed
        if precision == "auto":
            return False
        raise PassError(
            f"an op refuses bfloat16: {error}", where=where, remedy="Leave precision out, or say float32"
        ) from error


def autocast(device: torch.device, narrow: bool) -> torch.autocast:
    """Return a context in which products, and nothing that needs more digits, are computed in bfloat16.

    Args:
        device: where they are computed.
        narrow: without, the context changes nothing.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=narrow)
