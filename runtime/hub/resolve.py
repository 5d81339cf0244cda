"""From a reference to the folder of a bundle, for load() and for every command that takes a bundle.

A reference is the path of a folder, or a bundle on a model hub: "hub:user/name", the branch main of a
repository, or "hub:user/name@revision", a branch, a tag or a commit of it. Commands read "user/name@revision"
so, too, if there is no such folder. Without its revision it is a folder, so that a mistyped path asks no hub.
"""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from offramp.runtime.errors import BadSetting, BundleNotFound
from offramp.runtime.hub.reference import (
    PREFIX,
    REPOSITORY,
    HubReference,
    is_hub_reference,
    parse_hub_reference,
)


def resolve_bundle(reference: str | PathLike[str], *, command: bool = False) -> str | PathLike[str]:
    """The folder of a bundle: the reference itself, or the cached copy of a bundle on the hub.

    command: whether "user/name@revision" is a bundle on the hub if there is no such folder. A folder that is
    missing is an error here only if it may have been meant as a bundle on the hub. Raises BundleNotFound,
    BadSetting and what pull_bundle raises.
    """
    text = os.fspath(reference)
    if is_hub_reference(text):
        return _pull(parse_hub_reference(text))
    if not command or os.path.lexists(text):
        return reference
    repository, at, _ = text.partition("@")
    if not REPOSITORY.fullmatch(repository):
        return reference
    if not at:
        raise BundleNotFound(
            f"{text}: no such folder; write one with: python export/split.py ckpt/, or say {PREFIX}{text} if "
            "it is a bundle on the hub"
        )
    try:
        return _pull(parse_hub_reference(text))
    except (BundleNotFound, BadSetting) as problem:
        raise type(problem)(f"{text}: no such folder, and as a bundle on the hub: {problem}") from problem


def require_folder(reference: str | PathLike[str], command: str) -> Path:
    """The folder of a bundle that a command writes into; raises BadSetting for a bundle on the hub."""
    if not is_hub_reference(reference):
        return Path(reference)
    at = parse_hub_reference(os.fspath(reference))
    raise BadSetting(
        f"{reference}: {command} writes into the bundle, and the copy of one on the hub is shared; take one "
        f"of your own: hf download {at.repository} --revision {at.revision} --local-dir bundle/"
    )


def _pull(reference: HubReference) -> Path:
    from offramp.runtime.hub.pull import pull_bundle  # here: folders do not need it

    return pull_bundle(reference)
