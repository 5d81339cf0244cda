"""Errors of offramp.runtime: the tree of all errors that it raises on purpose.

OfframpError                     base of all others
├── BundleNotFound               FileNotFoundError   no bundle at that path, or a file of it is missing
├── BadBundle                    ValueError          a bundle that contradicts itself: hash, size, link, graph
│   └── BadManifest              ValueError          its manifest.json is invalid; names the field
├── BadInput                     ValueError          an item that cannot be answered
├── BadSetting                   ValueError          an option that is unknown, incomplete or contradictory
│   └── WrongTask                AttributeError      a method that the session of this bundle does not have
├── EngineUnavailable            RuntimeError        the requested engine or device is not there
├── OutOfMemory                  MemoryError         the GPU has not enough memory; the session stays usable
├── DeviceFailed                 RuntimeError        the GPU failed in the middle of work: load() again
└── SessionClosed                RuntimeError        the session was used after close()

Each also inherits the builtin error that fits, so that `except ValueError` works, too.
"""

from __future__ import annotations

from dataclasses import dataclass


class OfframpError(Exception):
    """Base of every error that offramp.runtime raises on purpose."""


class BundleNotFound(OfframpError, FileNotFoundError):
    """There is no bundle at the path, or a file that its manifest lists is missing."""


class BadBundle(OfframpError, ValueError):
    """A bundle contradicts itself; the message names the file."""


class BadManifest(BadBundle):
    """A manifest is invalid; the message names the field."""


class BadInput(OfframpError, ValueError):
    """An item cannot be answered; the message names the item or line."""


class BadSetting(OfframpError, ValueError):
    """An option is unknown, incomplete or contradicts another; the message names it."""


class WrongTask(BadSetting, AttributeError):
    """The session of this bundle lacks a method; the message names the one to call instead."""


class EngineUnavailable(OfframpError, RuntimeError):
    """The requested engine or device is not there; the message names what is missing and the cure."""


class OutOfMemory(OfframpError, MemoryError):
    """The GPU has not enough memory; the session stays usable."""


class DeviceFailed(OfframpError, RuntimeError):
    """CUDA or TensorRT failed in the middle of work; the message holds its error text."""


class SessionClosed(OfframpError, RuntimeError):
    """The session was used after close()."""


@dataclass(frozen=True)
class ItemError:
    """The result for an item that cannot be answered: its index (0-based) among the items, and the reason.

    It is a value that takes the place of an answer, not an exception.
    """

    index: int
    message: str
