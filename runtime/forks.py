"""Register what os.fork() calls: sessions rest while a process forks and reopen their graphs in the child."""

from __future__ import annotations

import os
from collections.abc import Callable


def after_fork(
    in_child: Callable[[], None],
    before: Callable[[], None] | None = None,
    in_parent: Callable[[], None] | None = None,
) -> None:
    """Register functions that os.fork() calls, for the rest of the process; nothing where there is no fork.

    in_child: afterwards, in the new process, whose only thread is the one that forked. before: before it.
    in_parent: afterwards, in the process that forked.
    """
    if hasattr(os, "register_at_fork"):
        hooks = {"before": before, "after_in_parent": in_parent, "after_in_child": in_child}
        os.register_at_fork(**{name: hook for name, hook in hooks.items() if hook is not None})
