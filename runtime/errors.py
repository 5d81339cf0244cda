"""Everything that offramp.runtime raises on purpose.

OfframpError                     catch this one to catch them all
├── BundleNotFound               FileNotFoundError   no bundle at that path, or a file of it is missing
├── BadBundle                    ValueError          a bundle that contradicts itself: hash, size, link, graph
│   └── BadManifest              ValueError          its manifest.json cannot be believed; names the field
├── BadInput                     ValueError          a text that cannot be answered
├── BadSetting                   ValueError          a wish that is unknown, incomplete or contradicts another
├── EngineUnavailable            RuntimeError        the engine or device asked for is not there
├── OutOfMemory                  MemoryError         the GPU has not enough memory; the session stays usable
├── DeviceFailed                 RuntimeError        the GPU failed in the middle of work: load() again
└── SessionClosed                RuntimeError        the session was used after close()

Each also inherits the builtin that fits, so a caller who knows nothing of offramp can still write `except
ValueError`.
"""

from __future__ import annotations


class OfframpError(Exception):
    """Base of every error that offramp.runtime raises on purpose."""


class BundleNotFound(OfframpError, FileNotFoundError):
    """There is no bundle at the path, or a file that its manifest lists is missing."""


class BadBundle(OfframpError, ValueError):
    """A bundle contradicts itself; the message names the file."""


class BadManifest(BadBundle):
    """A manifest that cannot be believed; the message names the field."""


class BadInput(OfframpError, ValueError):
    """A text that cannot be answered; the message names the item or line."""


class BadSetting(OfframpError, ValueError):
    """A wish of the caller that is unknown, incomplete or contradicts another; the message lists what is."""


class EngineUnavailable(OfframpError, RuntimeError):
    """The engine or device asked for is not there; the message names the missing piece and how to get it."""


class OutOfMemory(OfframpError, MemoryError):
    """The GPU has not enough memory for this; what it was doing before still stands."""


class DeviceFailed(OfframpError, RuntimeError):
    """CUDA or TensorRT failed in the middle of work; the message holds what it said."""


class SessionClosed(OfframpError, RuntimeError):
    """The session was used after close()."""
