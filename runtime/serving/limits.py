"""What a server takes, and its log."""

from __future__ import annotations

import logging
from dataclasses import dataclass

LOG = logging.getLogger("offramp.serve")


@dataclass(frozen=True)
class ServerLimits:
    """What a server takes. keys: API keys, none for no check; body: bytes of a request.

    items: texts or images of a request. timeout: seconds in which the body of a request must come; seconds in
    which rows must be answered, or a text must have its first token, if the request names no time. log:
    whether each request is logged.
    """

    keys: frozenset[str] = frozenset()
    body: int = 1 << 20
    items: int = 256
    timeout: float = 30.0
    log: bool = True
