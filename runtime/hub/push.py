"""ee-push: put a bundle into a repository of a model hub, as one commit.

\b
    ee-push bundle/ user/name --create            # a new public repository; --private: one that you alone see
    ee-push bundle/ user/name                     # a further commit
    ee-run --bundle user/name@main input.txt

The bundle is checked as ee-verify checks it, then its manifest, the files that the manifest names and its
signature are uploaded, and nothing else of the folder. A repository without a README.md gets a model card
made from the manifest. The manifest is public with the repository, and so is its provenance: ee-inspect shows
it. Log in first with: hf auth login, or set HF_TOKEN. Standard output has the address and the command that
runs the bundle. Exit codes: 0, or 2 if nothing was pushed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from offramp.runtime.progress import note
from offramp.runtime.summary import TYPED, CommandOutput, Summary, output_options

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from offramp.runtime.bundle.files import Bundle
    from offramp.runtime.hub.reference import HubReference

MESSAGE = "Upload a bundle of offramp"


@dataclass(frozen=True)
class Pushed:
    """A bundle that was pushed: the address of the repository at its revision, and the full commit."""

    url: str
    commit: str


def push_bundle(
    folder: Path,
    reference: HubReference,
    *,
    create: bool = False,
    private: bool = False,
    card: bool = False,
    message: str = MESSAGE,
) -> Pushed:
    """Verify a bundle and put it into a repository, as one commit on the branch of the reference.

    create: make the repository, and the branch, if they are missing; private: the new repository is private.
    card: replace a README.md that is there. Raises BadBundle and BundleNotFound as Bundle.verify does,
    BundleNotFound for a repository or branch that is missing, BadSetting if there is no right to write there,
    if huggingface_hub is missing, or if a repository that is there should be private and is public;
    OutputFailed if the upload fails.
    """
    from offramp.runtime.bundle.files import open_bundle
    from offramp.runtime.errors import BadSetting, BundleNotFound, OfframpError, OutputFailed
    from offramp.runtime.hub.client import hub_errors, is_unreachable, require_hub, translate
    from offramp.runtime.hub.reference import MAIN

    require_hub()
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    bundle = open_bundle(folder)
    bundle.verify()
    api, repository, revision = HfApi(library_name="offramp"), reference.repository, reference.revision
    try:
        if create:
            api.create_repo(repository, private=private or None, exist_ok=True)
            if private and not api.model_info(repository, revision=MAIN).private:
                raise BadSetting(
                    f"{repository}: it exists and is public; make it private there, or leave out --private"
                )
            if revision != MAIN:
                api.create_branch(repository, branch=revision, exist_ok=True)
        operations = _operations(api, bundle, reference, card=card)
        done = api.create_commit(repository, operations, commit_message=message or MESSAGE, revision=revision)
    except OfframpError:
        raise
    except hub_errors() as problem:
        error = translate(problem, reference)
        if is_unreachable(problem):
            raise OutputFailed(f"nothing was pushed: {error}") from problem
        missing = (RepositoryNotFoundError, RevisionNotFoundError)
        if isinstance(problem, missing) and not isinstance(problem, GatedRepoError) and not create:
            error = BundleNotFound(f"{error}; --create makes what is missing")
        raise error from problem
    except (OSError, ValueError, RuntimeError) as problem:  # of uploads, which have no class of their own
        cause = problem.__cause__ or problem
        text = " ".join(f"{problem} ({cause})".split() if cause is not problem else str(problem).split())
        raise OutputFailed(f"{reference}: the upload failed: {text[:300]}; push it again") from problem
    url = f"{api.endpoint}/{repository}" + (f"/tree/{revision}" if revision != MAIN else "")
    return Pushed(url, str(done.oid))


def _operations(
    api: HfApi, bundle: Bundle, reference: HubReference, *, card: bool
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What one commit changes: the bundle's files, its signature and the card."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    from offramp.runtime.bundle.manifest import FILE_NAME, SIGNATURE_NAME
    from offramp.runtime.hub.card import CARD_NAME, model_card

    def is_there(name: str) -> bool:
        return bool(api.file_exists(reference.repository, name, revision=reference.revision))

    signed = (bundle.folder / SIGNATURE_NAME).exists()
    names = [*bundle.manifest.files, FILE_NAME, *([SIGNATURE_NAME] if signed else [])]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(bundle.folder / name)) for name in names
    ]
    if not signed and is_there(SIGNATURE_NAME):  # that of another manifest
        operations.append(CommitOperationDelete(path_in_repo=SIGNATURE_NAME))
    if CARD_NAME in names:
        return operations
    if card or not is_there(CARD_NAME):
        text = model_card(bundle.manifest, reference.repository, reference.revision)
        operations.append(CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=text.encode("utf-8")))
    else:
        click.echo(f"{CARD_NAME} of {reference.repository} is kept; --card replaces it", err=True)
    return operations


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", metavar="USER/NAME")
@click.option("--create", is_flag=True, help="Make the repository, and the branch, if they are missing.")
@click.option("--private", is_flag=True, help="With --create: a repository that others do not see.")
@click.option("--revision", metavar="BRANCH", help="Branch that gets the commit.  [default: main]")
@click.option("--message", default=MESSAGE, show_default=True, help="Message of the commit.")
@click.option("--card", is_flag=True, help="Replace the README.md that is there by a new model card.")
@output_options
def main(
    bundle: Path,
    repository: str,
    create: bool,
    private: bool,
    revision: str | None,
    message: str,
    card: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Command ee-push; its help is the docstring of this module."""
    from offramp.runtime.errors import OfframpError
    from offramp.runtime.hub.reference import MAIN, PREFIX, HubReference

    if private and not create:
        raise click.UsageError("--private is of a new repository: give it with --create")
    name, at, branch = repository.removeprefix(PREFIX).partition("@")
    if at and revision is not None:
        raise click.UsageError(f"{repository} and --revision both name a branch: leave one of them out")
    output = CommandOutput(quiet, as_json)
    try:
        reference = HubReference(name, branch if at else revision or MAIN)
        with output.progress():
            note(f"checking {bundle}, then uploading it to {reference}")
            pushed = push_bundle(
                bundle, reference, create=create, private=private, card=card, message=message
            )
    except OfframpError as problem:
        click.echo(f"ee-push: {problem}", err=True)
        sys.exit(2)
    source = f"{PREFIX}{name}@{pushed.commit}"
    rows = [("bundle", str(bundle)), ("address", pushed.url), ("commit", pushed.commit)]
    facts = {"bundle": str(bundle), "repository": name, "url": pushed.url, "commit": pushed.commit}
    summary = Summary("Bundle pushed", rows, facts, ("ee-run", "--bundle", source), TYPED)
    output.finish(summary, f"{pushed.url}\nee-run --bundle {source} input.txt")


if __name__ == "__main__":
    main()
