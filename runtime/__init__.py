"""Walk a bundle: `from offramp.runtime import load; load("bundle/")("a stirring, funny film")`.

Importing this package loads numpy, but not onnxruntime and tokenizers, which are imported when a session is
opened.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from offramp.runtime.bundle.manifest import RuleSpec
from offramp.runtime.errors import (
    BadBundle,
    BadInput,
    BadManifest,
    BadSetting,
    BadSignature,
    BudgetExceeded,
    BundleNotFound,
    DeviceFailed,
    DriftWarning,
    EngineUnavailable,
    ItemError,
    OfframpError,
    OutOfMemory,
    OutputFailed,
    RunWarning,
    SessionClosed,
    SessionForked,
    WrongTask,
)
from offramp.runtime.loading import load, load_classifier, load_generator, load_row_session
from offramp.runtime.row_session import RowAnswer, RowSession
from offramp.runtime.session import Session

if TYPE_CHECKING:
    from offramp.runtime.classifier import Answer, Classifier
    from offramp.runtime.generator import TextGenerator
    from offramp.runtime.multi_label import MultiLabelAnswer, MultiLabelClassifier
    from offramp.runtime.sampling import Sampling
    from offramp.runtime.text_chunks import TextChunk
    from offramp.runtime.token_classifier import Entity, LabelledWord, TokenAnswer, TokenClassifier
    from offramp.runtime.values import Embedder, EmbeddingAnswer, RegressionAnswer, Regressor

# Sessions and their answers are imported at their first use, so that a session of another kind starts sooner.
_MODULES = {
    "Answer": "classifier",
    "Classifier": "classifier",
    "Embedder": "values",
    "EmbeddingAnswer": "values",
    "Entity": "token_classifier",
    "LabelledWord": "token_classifier",
    "MultiLabelAnswer": "multi_label",
    "MultiLabelClassifier": "multi_label",
    "RegressionAnswer": "values",
    "Regressor": "values",
    "Sampling": "sampling",
    "TextChunk": "text_chunks",
    "TextGenerator": "generator",
    "TokenAnswer": "token_classifier",
    "TokenClassifier": "token_classifier",
}

__all__ = [
    "Answer",
    "BadBundle",
    "BadInput",
    "BadManifest",
    "BadSetting",
    "BadSignature",
    "BudgetExceeded",
    "BundleNotFound",
    "Classifier",
    "DeviceFailed",
    "DriftWarning",
    "Embedder",
    "EmbeddingAnswer",
    "EngineUnavailable",
    "Entity",
    "ItemError",
    "LabelledWord",
    "MultiLabelAnswer",
    "MultiLabelClassifier",
    "OfframpError",
    "OutOfMemory",
    "OutputFailed",
    "RegressionAnswer",
    "Regressor",
    "RowAnswer",
    "RowSession",
    "RuleSpec",
    "RunWarning",
    "Sampling",
    "Session",
    "SessionClosed",
    "SessionForked",
    "TextChunk",
    "TextGenerator",
    "TokenAnswer",
    "TokenClassifier",
    "WrongTask",
    "load",
    "load_classifier",
    "load_generator",
    "load_row_session",
]


def __getattr__(name: str) -> type:
    """A session, answer or option of _MODULES."""
    if name in _MODULES:
        value: type = getattr(import_module(f"offramp.runtime.{_MODULES[name]}"), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
