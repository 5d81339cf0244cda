"""The C library's memory: large blocks are kept, not given back to the system after every step.

Logits of a language model are hundreds of megabytes. By default glibc maps each such block anew, and the
kernel clears it page by page: of adding up a few of that size that was three fifths of the time (231 ms
against 91, one core, trial), of a training step of SmolLM2-135M two fifths.
"""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
WISHES = ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 1 << 28))  # bytes


def keep_large_blocks() -> bool:
    """Ask for it, for the rest of this process; False where the C library is none that knows this."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(name, size) == 1 for name, size in WISHES])
