"""Walk a bundle: `from offramp.runtime import load; load("bundle/")("a stirring, funny film")`.

Importing this loads numpy and nothing heavy: onnxruntime and tokenizers come in when a session is opened.
"""

from __future__ import annotations

from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.classifier import Answer, Session
from offramp.runtime.errors import (
    BadBundle,
    BadInput,
    BadManifest,
    BadSetting,
    BundleNotFound,
    DeviceFailed,
    EngineUnavailable,
    OfframpError,
    OutOfMemory,
    SessionClosed,
)
from offramp.runtime.loading import load

__all__ = [
    "Answer",
    "BadBundle",
    "BadInput",
    "BadManifest",
    "BadSetting",
    "BundleNotFound",
    "DeviceFailed",
    "EngineUnavailable",
    "OfframpError",
    "OutOfMemory",
    "RuleSpec",
    "Session",
    "SessionClosed",
    "load",
]
