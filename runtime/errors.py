"""Errors of offramp.runtime: the tree of all errors that it raises on purpose.

OfframpError                     base of all others
├── BundleNotFound               FileNotFoundError   no bundle at that path, or a file of it is missing
├── BadBundle                    ValueError          a bundle that contradicts itself: hash, size, link, graph
│   ├── BadManifest              ValueError          its manifest.json is invalid; names the field
│   └── BadSignature             ValueError          not signed, or not by the key that was required
├── BadInput                     ValueError          an item that cannot be answered
├── BadSetting                   ValueError          an option that is unknown, incomplete or contradictory
│   └── WrongTask                AttributeError      a method that the session of this bundle does not have
├── EngineUnavailable            RuntimeError        the requested engine or device is not there
├── OutOfMemory                  MemoryError         too little memory, of a GPU too; the session stays usable
├── DeviceFailed                 RuntimeError        the GPU failed in the middle of work: load() again
├── OutputFailed                 OSError             the answers cannot be written: disk full, output closed
├── SessionForked                RuntimeError        a process that was forked cannot go on with this session
└── SessionClosed                RuntimeError        the session was used after close()

Each also inherits the builtin error that fits, so that `except ValueError` works, too. RunWarning, a
UserWarning, is the base of its warnings: BudgetExceeded, DriftWarning and, of hub, OfflineWarning.
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


class BadSignature(BadBundle):
    """A bundle has no signature, or not that of the required key; the message names both files."""


class BadInput(OfframpError, ValueError):
    """An item cannot be answered; the message names the item or line."""


class BadSetting(OfframpError, ValueError):
    """An option is unknown, incomplete or contradicts another; the message names it."""


class WrongTask(BadSetting, AttributeError):
    """The session of this bundle lacks a method; the message names the one to call instead."""


class EngineUnavailable(OfframpError, RuntimeError):
    """The requested engine or device is not there; the message names what is missing and the cure."""


class OutOfMemory(OfframpError, MemoryError):
    """There is not enough memory, on the machine or its GPU; the session stays usable."""


class DeviceFailed(OfframpError, RuntimeError):
    """CUDA or TensorRT failed in the middle of work; the message holds its error text."""


class OutputFailed(OfframpError, OSError):
    """The answers cannot be written; the message names the output and what the system says."""


class SessionForked(OfframpError, RuntimeError):
    """The process was forked, and what was open before has no threads or no device in it; load() again."""


class SessionClosed(OfframpError, RuntimeError):
    """The session was used after close()."""


class RunWarning(UserWarning):
    """Base of the warnings about a stream that a session walks; answers are given all the same."""


class BudgetExceeded(RunWarning):
    """A budget was not held over a window of rows; the message says by how much, and why."""


class DriftWarning(RunWarning):
    """The rows of a stream are not like those of the calibration; the message says what shows it."""


@dataclass(frozen=True)
class ItemError:
    """The result for an item that cannot be answered: its index (0-based) among the items, and the reason.

    It is a value that takes the place of an answer, not an exception.
    """

    index: int
    message: str
