"""Memory of one (rows, length) on a GPU: two places for what segments make anew, signals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.runtime.bundle.manifest import NEXT, SIGNALS, Manifest, Tensor, Variant
from offramp.runtime.engines.base import Array, Rows
from offramp.runtime.engines.buffers import Run
from offramp.runtime.engines.cuda import ALIGNMENT, Cuda
from offramp.runtime.engines.profiles import shape_of
from offramp.runtime.rules import Signals

Step = tuple[int, int]  # segment, variant; the stem's segment is -1 and its variant 0
Places = Mapping[str, tuple[int, tuple[int, ...]]]  # of each tensor of a graph: address and shape


@dataclass(frozen=True)
class Layout:
    """The tensors of a bundle by what becomes of them; signals: of each segment."""

    inputs: tuple[Tensor, ...]
    pairs: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]
    signals: tuple[tuple[Tensor, ...], ...]

    @classmethod
    def of(cls, manifest: Manifest, flows: frozenset[str], inputs: Sequence[Tensor]) -> Layout:
        """inputs: the stem's, with the dtypes that the engine reads them in."""
        made = manifest.stem.variants[manifest.variants[0]].outputs
        segments = [next(iter(stage.variants.values())) for stage in manifest.segments]
        return cls(
            tuple(inputs),
            tuple(tensor for tensor in made if tensor.name in flows),
            tuple(tensor for tensor in made if tensor.name not in flows),
            tuple(tuple(t for t in facts.outputs if t.name in SIGNALS) for facts in segments),
        )


class DeviceBuffers:
    """Everything that a walk of `rows` rows of `length` tokens needs; one owner until it is put back.

    pending: whether the device may still read the pinned inputs. bound: by (step, side), a run and where its
    signals are once the host has waited.
    """

    def __init__(self, cuda: Cuda, layout: Layout, rows: int, length: int) -> None:
        self.rows, self.length, self.pending = rows, length, False
        self.bound: dict[tuple[Step, int], tuple[Run, Signals | None]] = {}
        self._cuda, self._layout = cuda, layout
        device, host = _Ruler(rows, length), _Ruler(rows, length)
        # The inputs lie alike on both sides, so that one copy brings all of them.
        inputs = [device.place(tensor) for tensor in layout.inputs]
        self._input_bytes = device.end
        host.end = device.end
        pairs = [(device.place(tensor), device.place(tensor)) for tensor in layout.pairs]
        shared = [device.place(tensor) for tensor in layout.shared]
        said = device.end  # one place for the signals of all segments, one after another
        in_host = [[host.place(tensor) for tensor in tensors] for tensors in layout.signals]
        device.end += max((_span(places) for places in in_host), default=0)
        self._memory, self._pinned = cuda.memory(device.end), cuda.pinned(host.end)
        self.bytes = device.end
        base = self._memory.pointer
        self.inputs: dict[str, Array] = {
            tensor.name: self._view(place) for tensor, place in zip(layout.inputs, inputs, strict=True)
        }
        self._places = {
            tensor.name: (base + place.at, base + place.at)
            for tensor, place in zip((*layout.inputs, *layout.shared), (*inputs, *shared), strict=True)
        } | {
            tensor.name: (base + one.at, base + two.at)
            for tensor, (one, two) in zip(layout.pairs, pairs, strict=True)
        }
        self._said, self._in_host = base + said, in_host

    def places(self, graph: Variant, segment: int, side: int) -> Places:
        """Where a graph that reads `side` finds its inputs and puts its outputs; segment -1: the stem."""
        found = {}
        signals = dict(self._signal_places(segment)) if segment >= 0 else {}
        for tensor in (*graph.inputs, *graph.outputs):
            shape = shape_of(tensor, self.rows, self.length)
            if tensor.name in SIGNALS:
                found[tensor.name] = signals[tensor.name].at + self._said, shape
            elif tensor.name.startswith(NEXT):
                found[tensor.name] = self._places[tensor.name.removeprefix(NEXT)][1 - side], shape
            else:
                found[tensor.name] = self._places[tensor.name][side], shape
        return found

    def signals(self, segment: int) -> tuple[Run, Signals]:
        """A copy of a segment's signals to the host, enqueued when called, and where they will be."""
        places = self._in_host[segment]
        first, size = places[0].at, _span(places)
        target, source, download = self._pinned.pointer + first, self._said, self._cuda.download
        views = {
            tensor.name: self._view(place)
            for tensor, place in zip(self._layout.signals[segment], places, strict=True)
        }
        said = Signals(views["logits"], views.get("gate"), views.get("forecast"))
        return lambda: download(target, source, size), said

    def upload(self) -> None:
        """Enqueue the copy of the inputs to the device."""
        self.pending = True
        self._cuda.upload(self._memory.pointer, self._pinned.pointer, self._input_bytes)

    def gather(self, sources: Sequence[tuple[DeviceBuffers, int, Rows | None]]) -> None:
        """Fill side 0 and the shared tensors with rows (None: all) of (buffers, side), one after another."""
        at = 0
        for buffers, side, rows in sources:
            chosen = [(0, buffers.rows)] if rows is None else list(_runs(rows))
            for tensor in (*self._layout.pairs, *self._layout.shared):
                target, source = self._places[tensor.name][0], buffers._places[tensor.name][side]
                size = _bytes(tensor, self.rows, self.length)
                if not tensor.per_row:
                    self._cuda.copy(target, source, size)
                    continue
                row, to = size // self.rows, at
                for start, count in chosen:
                    self._cuda.copy(target + to * row, source + start * row, count * row)
                    to += count
            at += sum(count for _, count in chosen)

    def _signal_places(self, segment: int) -> Iterator[tuple[str, _Place]]:
        places = self._in_host[segment]
        for tensor, place in zip(self._layout.signals[segment], places, strict=True):
            yield tensor.name, _Place(place.at - places[0].at, place.shape, place.dtype)

    def _view(self, place: _Place) -> Array:
        size = int(np.prod(place.shape)) * place.dtype.itemsize
        return self._pinned.array[place.at : place.at + size].view(place.dtype).reshape(place.shape)


@dataclass(frozen=True)
class _Place:
    at: int  # bytes from the start
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def end(self) -> int:
        return self.at + int(np.prod(self.shape)) * self.dtype.itemsize


class _Ruler:
    """Lays tensors out one after another, each aligned as the device likes it."""

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length, self.end = rows, length, 0

    def place(self, tensor: Tensor) -> _Place:
        at = -(-self.end // ALIGNMENT) * ALIGNMENT
        place = _Place(at, shape_of(tensor, self.rows, self.length), np.dtype(tensor.dtype))
        self.end = -(-place.end // ALIGNMENT) * ALIGNMENT
        return place


def _span(places: Sequence[_Place]) -> int:
    return places[-1].end - places[0].at if places else 0


def _bytes(tensor: Tensor, rows: int, length: int) -> int:
    return int(np.prod(shape_of(tensor, rows, length))) * np.dtype(tensor.dtype).itemsize


def _runs(rows: Rows) -> Iterator[tuple[int, int]]:
    """Stretches of neighbouring rows, (first, count), so that each is one copy."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    for stretch in np.split(rows, breaks):
        yield int(stretch[0]), len(stretch)
