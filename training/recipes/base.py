"""The protocols of a recipe: the names that its module must define."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Protocol, TypeVar

from offramp.models.decoder import DecoderNetwork
from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.training.batches import Encoded
from offramp.training.lm_data import TokenRows
from offramp.training.loop import Run


class Settings(Protocol):
    """The settings of a recipe: a frozen dataclass whose every field is a --set NAME=VALUE of ee-train."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]


S = TypeVar("S")


class ClassifierRecipe(Protocol[S]):
    """A recipe that trains an EarlyExitNetwork.

    NEEDS_LABELS: whether every row of train and dev must have a label; a recipe that does without learns from
    the answers of the user's model. SETTINGS: the class of its settings. STARTS_FROM: the recipe whose
    checkpoint, passed as --init, replaces its first phase, or None if it starts from the pretrained backbone.
    """

    __name__: str  # that of its module
    KIND: Literal["classifier"]
    NEEDS_LABELS: bool
    SETTINGS: type[S]
    STARTS_FROM: str | None

    def parts_of(self, settings: S) -> ExitParts:
        """The parts of the network's exits; options --pooling and --head of ee-train replace two of them."""
        ...

    def train(
        self,
        run: Run[EarlyExitNetwork],
        train: Encoded,
        dev: Encoded,
        settings: S,
        *,
        skip_warm_start: bool,
    ) -> dict[str, object]:
        """Run the phases; return the recipe's entries of training.json."""
        ...


class DecoderRecipe(Protocol[S]):
    """A recipe that trains a DecoderNetwork; SETTINGS and STARTS_FROM as in ClassifierRecipe."""

    KIND: Literal["decoder"]
    SETTINGS: type[S]
    STARTS_FROM: str | None

    def prepare(self, network: DecoderNetwork, exits: tuple[int, ...], settings: S) -> None:
        """Add the modules that the recipe trains, before a run restores an earlier state.

        exits: blocks (1-based) with an exit, the last block among them. Raises BadSetting if the network has
        other exits.
        """
        ...

    def train(
        self,
        run: Run[DecoderNetwork],
        rows: dict[str, TokenRows],
        exits: tuple[int, ...],
        settings: S,
    ) -> dict[str, object]:
        """Run the phases on rows["train"]; return the recipe's entries of training.json.

        rows: by split; dev is optional.
        """
        ...


Recipe = ClassifierRecipe[Settings] | DecoderRecipe[Settings]
