"""References to bundles on a model hub: "hub:user/name" or "hub:user/name@revision"."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from os import PathLike

from offramp.runtime.errors import BadSetting

PREFIX, MAIN = "hub:", "main"
REPOSITORY = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
# What the hub allows. Both become names of folders and files of the cache, so neither may begin with a dot.
_REVISION = re.compile(r"[A-Za-z0-9_][\w.+/-]{0,99}", re.ASCII)
_LONGEST_REPOSITORY = 96


@dataclass(frozen=True)
class HubReference:
    """A bundle on the hub: its repository, "user/name", and a branch, tag or commit of it."""

    repository: str
    revision: str = MAIN

    def __post_init__(self) -> None:
        """Raise BadSetting for names that no hub has."""
        name = self.repository
        odd = any(pair in name for pair in ("--", "..")) or len(name) > _LONGEST_REPOSITORY
        if odd or not REPOSITORY.fullmatch(name):
            raise BadSetting(f"{name!r:.120} is not the name of a repository on the hub: write user/name")
        if ".." in self.revision or not _REVISION.fullmatch(self.revision):
            raise BadSetting(
                f"{name}: {self.revision!r:.120} is not a revision: write a branch, a tag or a commit after @"
            )

    def __str__(self) -> str:
        """The reference as load() takes it."""
        return f"{PREFIX}{self.repository}@{self.revision}"


def parse_hub_reference(text: str) -> HubReference:
    """Parse "user/name" or "user/name@revision", with or without "hub:"; raises BadSetting for other text."""
    repository, at, revision = text.removeprefix(PREFIX).partition("@")
    return HubReference(repository, revision if at else MAIN)


def is_hub_reference(reference: str | PathLike[str]) -> bool:
    """Whether a reference begins with "hub:"; a folder of such a name is written ./hub:..."""
    return os.fspath(reference).startswith(PREFIX)
