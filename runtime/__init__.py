"""Walk a bundle: `from offramp.runtime import load; load("bundle/")("a stirring, funny film")`.

Importing this package loads numpy, but not onnxruntime and tokenizers, which are imported when a session is
opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.classifier import Answer, Classifier
from offramp.runtime.errors import (
    BadBundle,
    BadInput,
    BadManifest,
    BadSetting,
    BundleNotFound,
    DeviceFailed,
    EngineUnavailable,
    ItemError,
    OfframpError,
    OutOfMemory,
    SessionClosed,
    WrongTask,
)
from offramp.runtime.loading import load, load_classifier, load_generator
from offramp.runtime.session import Session

if TYPE_CHECKING:
    from offramp.runtime.generator import TextChunk, TextGenerator

__all__ = [
    "Answer",
    "BadBundle",
    "BadInput",
    "BadManifest",
    "BadSetting",
    "BundleNotFound",
    "Classifier",
    "DeviceFailed",
    "EngineUnavailable",
    "ItemError",
    "OfframpError",
    "OutOfMemory",
    "RuleSpec",
    "Session",
    "SessionClosed",
    "TextChunk",
    "TextGenerator",
    "WrongTask",
    "load",
    "load_classifier",
    "load_generator",
]


def __getattr__(name: str) -> type:
    """Import the session of decoders at its first use, so that classifiers start sooner."""
    if name in ("TextChunk", "TextGenerator"):
        from offramp.runtime import generator

        value: type = getattr(generator, name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
