"""layer_selection: answer tokens skip blocks by fixed lists, random routes or controllers (arXiv 2410.20022).

selection= says how the blocks of an answer token are chosen; tokens of a prompt run all blocks:

full: all blocks, ordinary fine-tuning, from which the others start (--model of its folder, or full_epochs=2).
skip: a fixed list is skipped, spread evenly (blocks_run=15) or given (skipped=2,4,6).
exit: the blocks above blocks_run are skipped.
random: each row runs blocks_run blocks that are drawn for it. stochastic: each token draws each block.
menu: each row draws one of the even lists of blocks_run=30,15,7, so that one model serves all of them. Ours.
controllers: models.controllers, trained by hard Gumbel softmax with straight-through gradients at
temperature tau and the loss alpha * mean over the controlled blocks of the share of answer tokens that run
them. Hidden states are detached before a controller reads them. input=fixed is the published control.
ee-split writes them into the bundle, which walks by them (rule select).

Blocks that no answer token runs are frozen, as published. Loss: cross-entropy of the completion.

We differ: the first and the last block always run, except in a list that is given; a random route is drawn
once a row and step, not at every forward call; backbone=frozen trains controllers alone (published: all;
backbone=trained), they run nearly all blocks at first (start), and the token that skips a block is the one
that predicts, not the one that is predicted; the first answer token is predicted by the prompt's last, which
runs all blocks. Where no later token reads a skipped block (skip, exit, random, menu) its keys and values
have no effect; elsewhere they are computed from the token's unchanged hidden state, as published.

Published: hidden states add little over the control; our measurements are in docs/log.md.

    ee-train --model MODEL --data PAIRS --recipe layer_selection --set selection=full --out full/
    ee-train --model full/ --data PAIRS --recipe layer_selection --set selection=skip --set blocks_run=15 \
        --out skip15/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.controllers import INPUTS, Controllers, controllers_of
from offramp.models.decoder import BlockMask, DecoderNetwork
from offramp.runtime.errors import BadSetting
from offramp.runtime.rules.skip import skipped_segments
from offramp.training.lm_data import IGNORED, TokenRows
from offramp.training.loop import Phase, Run
from offramp.training.token_exits import may_exit_early

SELECTIONS = ("controllers", "full", "skip", "exit", "random", "stochastic", "menu")
BACKBONES = ("frozen", "trained")
EVALUATION_BATCH = 8
CONTROLLERS_LR, MODEL_LR = 1e-3, 2e-5  # the second as published for Alpaca


@dataclass(frozen=True)
class LayerSelectionSettings:
    """Settings of recipe layer_selection.

    selection: one of SELECTIONS. blocks_run: number of blocks that an answer token runs; several, separated
    by commas, for selection=menu. skipped: blocks (1-based) of selection=skip in place of blocks_run.
    full_epochs: epochs of ordinary fine-tuning before. lr: of all trained parameters; 0: 1e-3 where
    controllers learn alone, else 2e-5.
    alpha: price of running all blocks, in nats a token; tau: temperature of the gradients; start: logit of
    running before training.
    """

    epochs: int = 1
    batch_size: int = 8
    lr: float = 0.0
    selection: str = "controllers"
    blocks_run: str = ""
    skipped: str = ""
    full_epochs: int = 0
    alpha: float = 1.0
    tau: float = 1.0
    start: float = 2.0
    input: str = "hidden"
    backbone: str = "frozen"

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1 or self.tau <= 0:
            raise ValueError(f"epochs, batch_size and tau must be positive: {self}")
        if min(self.alpha, self.lr, self.full_epochs) < 0:
            raise ValueError(f"alpha, lr and full_epochs are no less than 0: {self}")
        choices = (("input", INPUTS), ("backbone", BACKBONES), ("selection", SELECTIONS))
        for name, known in choices:
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}={value}: choose among {', '.join(known)}")
        counts, listed = numbers_of("blocks_run", self.blocks_run), numbers_of("skipped", self.skipped)
        if listed and (self.selection != "skip" or counts):
            raise ValueError("skipped is a list for selection=skip, in place of blocks_run")
        needs = {"controllers": 0, "full": 0, "menu": len(counts) or 1, "skip": 0 if listed else 1}
        if len(counts) != needs.get(self.selection, 1):
            raise ValueError(
                f"selection={self.selection} does not go with blocks_run={self.blocks_run!r}: skip, exit, "
                "random and stochastic take one number, menu one or more, the others none"
            )

    @property
    def learning_rate(self) -> float:
        """The learning rate, 0 replaced by the default of what is trained."""
        alone = self.selection == "controllers" and self.backbone == "frozen"
        return self.lr or (CONTROLLERS_LR if alone else MODEL_LR)


KIND: Literal["decoder"] = "decoder"
SETTINGS = LayerSelectionSettings
STARTS_FROM: str | None = None


def numbers_of(name: str, text: str) -> tuple[int, ...]:
    """The whole numbers of a setting that separates them by commas; raises ValueError naming it."""
    try:
        numbers = tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError as problem:
        raise ValueError(f"{name}={text}: whole numbers, separated by commas") from problem
    if any(number < 1 for number in numbers):
        raise ValueError(f"{name}={text}: numbers from 1")
    return numbers


def even_skip(blocks: int, run: int) -> frozenset[int]:
    """The blocks (0-based) that are skipped so that `run` are left, spread evenly; see skipped_segments.

    Raises BadSetting unless `run` is between 2 and `blocks`.
    """
    if not 2 <= run <= blocks:
        raise BadSetting(
            f"blocks_run={run}: the model has {blocks} blocks, the first and the last always run"
        )
    return skipped_segments(blocks, run)


def routes_of(settings: LayerSelectionSettings, blocks: int) -> list[frozenset[int]]:
    """The fixed lists of skipped blocks (0-based) of a selection; empty for those that draw or control.

    Raises BadSetting if they do not fit a model of so many blocks.
    """
    counts = numbers_of("blocks_run", settings.blocks_run)
    if settings.selection == "skip" and settings.skipped:
        listed = numbers_of("skipped", settings.skipped)
        if max(listed) > blocks or len(set(listed)) == blocks:
            raise BadSetting(f"skipped={settings.skipped}: some of the {blocks} blocks, not all")
        return [frozenset(block - 1 for block in listed)]
    if settings.selection == "exit":
        if counts[0] > blocks:
            raise BadSetting(f"blocks_run={counts[0]}: the model has {blocks} blocks")
        return [frozenset(range(counts[0], blocks))]
    if settings.selection in ("skip", "menu"):
        return [even_skip(blocks, run) for run in counts]
    if settings.selection == "full":
        return [frozenset()]
    for run in counts:
        even_skip(blocks, run)  # refuses a number that does not fit
    return []


def prepare(network: DecoderNetwork, exits: tuple[int, ...], settings: LayerSelectionSettings) -> None:
    """Add new controllers for all blocks but the first and the last, or remove those of an earlier training.

    Raises BadSetting if the settings do not fit the model.
    """
    routes_of(settings, network.block_count)
    network.controllers = nn.ModuleDict()
    if settings.selection == "controllers":
        network.controllers = Controllers(
            network.block_count, network.hidden_size, input=settings.input, start=settings.start
        )


def run_mask(runs: Tensor, may_skip: Tensor) -> BlockMask:
    """A block mask of the blocks that are run, for the tokens that may skip; other tokens run all.

    runs: whether each block is run [batch or 1, seq or 1, blocks]; may_skip [batch, seq].
    """

    def block_mask(block: int, hidden: Tensor) -> Tensor | None:
        if bool(runs[..., block].all()):
            return None
        return torch.where(may_skip, runs[..., block].to(hidden.dtype), 1.0)

    return block_mask


def route_runs(routes: list[frozenset[int]], blocks: int) -> Tensor:
    """Which blocks each route runs [routes, blocks], of lists of skipped blocks (0-based)."""
    return torch.tensor([[block not in skipped for block in range(blocks)] for skipped in routes])


def random_runs(rows: int, blocks: int, run: int) -> Tensor:
    """Random routes: the first, the last and `run` - 2 other blocks a row [rows, blocks]."""
    order = torch.rand(rows, blocks - 2).argsort(1).argsort(1)
    ends = torch.ones(rows, 1, dtype=torch.bool)
    return torch.cat([ends, order < run - 2, ends], 1)


def draw_mask(settings: LayerSelectionSettings, blocks: int, may_skip: Tensor) -> BlockMask | None:
    """The block mask of one batch for all selections but controllers; None where every token runs all blocks.

    may_skip [batch, seq]: answer tokens. Routes of selections random, stochastic and menu are drawn with
    torch's generator.
    """
    rows, tokens = may_skip.shape
    routes = routes_of(settings, blocks)
    if routes == [frozenset()]:
        return None
    if routes:
        index = torch.randint(len(routes), (rows,)) if len(routes) > 1 else torch.zeros(1, dtype=torch.long)
        runs = route_runs(routes, blocks)[index][:, None]  # [batch or 1, 1, blocks]
    elif settings.selection == "random":
        runs = random_runs(rows, blocks, int(settings.blocks_run))[:, None]
    else:
        share = (int(settings.blocks_run) - 2) / max(1, blocks - 2)
        runs = torch.rand(rows, tokens, blocks) < share
        runs[..., [0, blocks - 1]] = True
    return run_mask(runs.to(may_skip.device), may_skip)


def controlled_blocks(
    controllers: Controllers, may_skip: Tensor, tau: float | None, shares: list[Tensor], shift: float = 0.0
) -> BlockMask:
    """A block mask of the blocks that controllers choose: sampled at temperature tau or, for None, the
    likelier.

    may_skip [batch, seq]: tokens that are controlled; others run all blocks. The share of them that runs each
    controlled block is appended to `shares`. shift is added to the logits of running, without tau.
    """

    def block_mask(block: int, hidden: Tensor) -> Tensor | None:
        number = block + 1
        if str(number) not in controllers:
            return None
        if tau is None:
            runs = (controllers.margin(number, hidden) + shift > 0).to(hidden.dtype)
        else:
            runs = controllers.sample(number, hidden, tau)
        shares.append((runs * may_skip).sum() / may_skip.sum().clamp(min=1))
        return torch.where(may_skip, runs, 1.0)

    return block_mask


def train(
    run: Run[DecoderNetwork],
    rows: dict[str, TokenRows],
    exits: tuple[int, ...],
    settings: LayerSelectionSettings,
) -> dict[str, Any]:
    """Train in one phase, after one of ordinary fine-tuning if asked for; return dev figures with and without
    the selection.
    """
    network, train_rows, s = run.network, rows["train"], settings
    controllers = controllers_of(network)
    if (controllers is None) == (s.selection == "controllers"):
        raise ValueError("call prepare(network, exits, settings) before creating the run")

    def cross_entropy(model: nn.Module, index: np.ndarray, selects: bool) -> tuple[Tensor, list[Tensor]]:
        ids, targets = train_rows.batch(index, run.accelerator.device)
        shares, mask = list[Tensor](), None
        if selects and controllers is not None:
            mask = controlled_blocks(controllers, may_exit_early(targets), s.tau, shares)
        elif selects:
            mask = draw_mask(s, network.block_count, may_exit_early(targets))
        last, learned = model(ids, mask)[-1], targets != IGNORED
        logits = network.head(last[learned]).float()  # [tokens, vocabulary]
        return functional.cross_entropy(logits, targets[learned]), shares

    def full_loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        return cross_entropy(model, index, False)[0], {}

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        task, shares = cross_entropy(model, index, True)
        if not shares:
            return task, {}
        share = torch.stack(shares).mean()
        return task + s.alpha * share, {"task": float(task.detach()), "block_share": float(share.detach())}

    lengths, size = train_rows.lengths, s.batch_size
    if s.full_epochs:
        lr = s.lr if s.lr and s.selection != "controllers" else MODEL_LR
        run.fit(Phase("full", ("model",), lengths, full_loss, s.full_epochs, size, lr, warmup=0.05))
    trains = trained_names(network, s)
    run.fit(Phase(s.selection, trains, lengths, loss, s.epochs, size, s.learning_rate, warmup=0.05))
    if controllers is not None:
        controllers.fold_fixed_input()
    return {"dev": measure_selection(run, rows["dev"], s)} if "dev" in rows else {}


def trained_names(network: DecoderNetwork, settings: LayerSelectionSettings) -> tuple[str, ...]:
    """Names of the parameters that a selection trains: not those of blocks that no answer token runs."""
    if settings.selection == "controllers":
        return ("controllers",) if settings.backbone == "frozen" else ("model", "controllers")
    routes = routes_of(settings, network.block_count)
    never_run = frozenset.intersection(*routes) if routes else frozenset()
    frozen = {id(p) for block in never_run for p in network.blocks[block].parameters()}
    model = network.model.named_parameters(prefix="model")
    return tuple(name for name, parameter in model if id(parameter) not in frozen)


@torch.no_grad()
def measure_selection(
    run: Run[DecoderNetwork], rows: TokenRows, settings: LayerSelectionSettings, max_rows: int = 64
) -> dict[str, Any]:
    """Evaluate the selection on the first `max_rows` rows, beside running all blocks.

    Gives the number of answer tokens that may skip, their loss in nats with all blocks and with the
    selection, and mean blocks run; with controllers the share of tokens that run each controlled block.
    Routes that are drawn are drawn with a fixed seed. Controllers take the likelier choice.
    """
    network, device = run.network, run.accelerator.device
    controllers = controllers_of(network)
    network.eval()
    token_count, full_loss, selected_loss, blocks_run = 0, 0.0, 0.0, 0.0
    block_shares = torch.zeros(len(network.controllers), device=device)
    count = min(max_rows, len(rows))
    torch.manual_seed(0)
    for start in range(0, count, EVALUATION_BATCH):
        ids, targets = rows.batch(range(start, min(start + EVALUATION_BATCH, count)), device)
        may_skip, shares = may_exit_early(targets), list[Tensor]()
        tokens = int(may_skip.sum())
        if not tokens:
            continue
        if controllers is not None:
            mask: BlockMask | None = controlled_blocks(controllers, may_skip, None, shares)
        else:
            mask = draw_mask(settings, network.block_count, may_skip)
        depth = torch.full(ids.shape, float(network.block_count), device=device)
        states = network(ids, None if mask is None else counting(mask, depth))
        selected_loss += _loss_sum(network, states[-1], targets, may_skip)
        full_loss += _loss_sum(network, network(ids)[-1], targets, may_skip)
        blocks_run += float(depth[may_skip].sum())
        if shares:
            block_shares += torch.stack(shares) * tokens
        token_count += tokens
    figures: dict[str, Any] = {
        "tokens": token_count,
        "loss_full": round(full_loss / max(1, token_count), 4),
        "loss": round(selected_loss / max(1, token_count), 4),
        "depth": round(blocks_run / max(1, token_count), 3),
    }
    if controllers is not None:
        figures["block_shares"] = [round(share, 4) for share in (block_shares / max(1, token_count)).tolist()]
    return figures


def counting(block_mask: BlockMask, depth: Tensor) -> BlockMask:
    """The same block mask, which subtracts the blocks that tokens skip from `depth` [batch, seq] in place."""

    def counted(block: int, hidden: Tensor) -> Tensor | None:
        mask = block_mask(block, hidden)
        if mask is not None:
            depth.sub_(1 - mask.to(depth.dtype))
        return mask

    return counted


def _loss_sum(network: DecoderNetwork, hidden: Tensor, targets: Tensor, where: Tensor) -> float:
    logits = network.head(hidden[where]).float()
    return float(functional.cross_entropy(logits, targets[where], reduction="sum"))
