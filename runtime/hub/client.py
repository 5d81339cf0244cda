"""The optional package huggingface_hub, and its errors as errors of the runtime."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module
from typing import Protocol

from offramp.runtime.errors import BadSetting, BundleNotFound, OfframpError
from offramp.runtime.hub.reference import HubReference

OLDEST = 1  # major version: the first whose session streams with httpx
LOG_IN = "log in with: hf auth login, or set HF_TOKEN"
# The hub is overloaded or broken for the moment; what it says of the repository is not known.
_BROKEN = (408, 429, *range(500, 600))


def require_hub() -> None:
    """Raise BadSetting with the cure if the package huggingface_hub is missing or too old."""
    cure = "pip install 'offramp[hub]'"
    try:
        version = str(import_module("huggingface_hub").__version__)
    except ImportError as problem:
        raise BadSetting(
            f"bundles on a hub need the package huggingface_hub ({problem}); {cure}"
        ) from problem
    if int(version.partition(".")[0]) < OLDEST:
        raise BadSetting(f"huggingface_hub {version} is too old, it must be {OLDEST}.0 or newer; {cure}")


class Progress(Protocol):
    """A progress bar that counts bytes."""

    def update(self, n: int, /) -> object:
        """Count bytes that were received."""


def progress_bar(size: int, name: str) -> AbstractContextManager[Progress]:
    """A progress bar of the library on standard error, if that is a terminal and the user wants bars."""
    bar: AbstractContextManager[Progress] = import_module("huggingface_hub.utils").tqdm(
        total=size, unit="B", unit_scale=True, desc=name, disable=None
    )
    return bar


def request_headers() -> dict[str, str]:
    """Headers of a request: the user's token, from the places where the library keeps it, and who asks."""
    headers: dict[str, str] = import_module("huggingface_hub.utils").build_hf_headers(library_name="offramp")
    return headers


def transport_error() -> type[Exception]:
    """The class of errors of connections: that of httpx, which has another name in each of its packages."""
    from huggingface_hub.errors import HfHubHTTPError

    error: type[Exception] = HfHubHTTPError.__mro__[1]
    return error


def is_unreachable(problem: BaseException) -> bool:
    """Whether an error says that the hub cannot be asked now: offline, no connection, overloaded, broken."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(problem, HfHubHTTPError):
        return problem.response.status_code in _BROKEN
    return isinstance(problem, (OfflineModeIsEnabled, transport_error()))


def hub_errors() -> tuple[type[Exception], ...]:
    """All that calls of huggingface_hub raise on purpose, for `except`."""
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled

    return (transport_error(), EntryNotFoundError, HFValidationError, OfflineModeIsEnabled)


def translate(problem: BaseException, reference: HubReference) -> OfframpError:
    """The error of the runtime for an error of huggingface_hub: one line that ends with the cure."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, page = reference.repository, f"{constants.ENDPOINT}/{reference.repository}"
    if isinstance(problem, GatedRepoError):
        return BundleNotFound(f"{name}: access is given on request; ask for it at {page}, then {LOG_IN}")
    if isinstance(problem, RepositoryNotFoundError):
        return BundleNotFound(
            f"{name}: the hub has no such repository, or it is private and there is no token for it; compare "
            f"the name with {page}, or {LOG_IN}"
        )
    if isinstance(problem, RevisionNotFoundError):
        return BundleNotFound(
            f"{name}: it has no revision {reference.revision}; name a branch, a tag or a commit of {page}"
        )
    if isinstance(problem, EntryNotFoundError):
        return BundleNotFound(f"{reference}: not a complete bundle, a file is missing; push it with: ee-push")
    if isinstance(problem, HfHubHTTPError) and problem.response.status_code in (401, 403):
        status, text = problem.response.status_code, _one_line(problem.server_message or "access refused")
        return BadSetting(f"{name}: the hub answers {status} ({text}): no token may do this; {LOG_IN}")
    if isinstance(problem, HfHubHTTPError):
        status, text = problem.response.status_code, _one_line(problem.server_message or "no reason is given")
        return BundleNotFound(f"{name}: {constants.ENDPOINT} answers {status} ({text}); try again later")
    if isinstance(problem, OfflineModeIsEnabled):
        return BundleNotFound(f"{reference}: HF_HUB_OFFLINE forbids to ask the hub; unset it")
    text = _one_line(f"{type(problem).__name__}: {problem}")
    return BundleNotFound(
        f"{reference}: {constants.ENDPOINT} cannot be reached ({text}); check the network, and HF_ENDPOINT "
        "if it is set"
    )


def _one_line(text: str) -> str:
    """Text of others for a message: without control characters, and not long."""
    return "".join(c if c.isprintable() else " " for c in text)[:200].strip()
