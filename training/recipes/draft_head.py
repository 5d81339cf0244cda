"""draft_head: a small block that drafts for a frozen model (EAGLE, arXiv 2401.15077).

models.draft_head has the block. Phase 1 runs the frozen model once over the data and keeps the normed hidden
state of every token in a file (float16). Phase 2 trains the draft head on it: smooth L1 of the predicted
normed state, in units of the state's own size, and cross-entropy to the probabilities of the frozen head over
the ids of the draft head. Both are averaged over `steps` drafts in a row, of which the second reads the
prediction of the first in place of the model's state and so on, as at run time; each counts STEP_DECAY times
the one before. The model's weights do not change, nor does any text: drafts are verified by full depth.

Before phase 2, the joining layer is fitted by least squares to what the last block reads at the token whose
state is predicted, and the draft head's block is a copy of the last block.

The best data are texts as the model itself continues them, prompt and completion, since a draft is accepted
where the model predicts the same: benchmarks/fetch.py answers makes such rows.

We differ: EAGLE's block has random weights and no first norm and is trained on one step; several steps are
those of its successors (HASS, arXiv 2408.15766; EAGLE-3, arXiv 2503.01840). Both inputs are scaled to one
size. Drafts are chains, not trees, and drafted ids are the first 16,384 of a large vocabulary.

Expect: dev in training.json has the share of drafts that the model accepts, by place in a row of drafts.
SmolLM2-135M took 7 ms of processor time a token for the states and 5 ms a token and epoch for the training,
in bf16 on 2 cores that did other work: about 1.5 hours for 400,000 tokens and 4 epochs (extrapolated).

    ee-train --model MODEL --data ANSWERS --recipe draft_head --out ckpt/
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.models.decoder import DecoderNetwork, cap
from offramp.models.draft_head import (
    PREFIX,
    DraftHead,
    add_draft_head,
    draft_head_of,
    normed_before,
    normed_hidden,
    predict_hidden,
)
from offramp.runtime.progress import note, progress, track
from offramp.training.batches import sorted_batches
from offramp.training.checkpoint import read_json, write_json
from offramp.training.lm_data import IGNORED, TokenRows
from offramp.training.loop import Phase, Run

STEP_DECAY = 0.8  # weight of the loss of a step, as a share of that of the step before
MEASURED_STEPS = 3  # drafts in a row of the dev figures
DEV_ROWS = 64
EVALUATION_BATCH = 8
CACHE_BATCH = 8  # rows of which states are computed together
SAVED_EVERY = 16  # such batches after which a run that is killed need not compute them again
FIT_TOKENS = 8  # tokens of the least-squares fit for each of its unknowns
RIDGE = 1e-3  # of the fit, as a share of the mean square of an input


@dataclass(frozen=True)
class DraftHeadSettings:
    """Settings of recipe draft_head.

    steps: drafts in a row that are trained. noise: uniform noise on the states that the first of them reads,
    in units of their size. feature_weight: weight of the smooth L1 loss against the cross-entropy. tokens:
    most tokens of the training rows that are used, each of which takes 2 * hidden size bytes in a file.
    draft_ids: ids of the draft head, as ee-split makes it.
    """

    epochs: int = 4
    batch_size: int = 8
    lr: float = 1e-3
    steps: int = 3
    noise: float = 0.1
    feature_weight: float = 1.0
    tokens: int = 400_000
    draft_ids: int = 16_384

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size, self.steps, self.tokens, self.draft_ids) < 1 or self.lr <= 0:
            raise ValueError(f"epochs, batch_size, steps, tokens, draft_ids and lr must be positive: {self}")
        if min(self.noise, self.feature_weight) < 0:
            raise ValueError(f"noise and feature_weight are no less than 0: {self}")


KIND: Literal["decoder"] = "decoder"
SETTINGS = DraftHeadSettings
STARTS_FROM: str | None = None


def prepare(network: DecoderNetwork, exits: tuple[int, ...], settings: DraftHeadSettings) -> None:
    """Add a draft head if the network has none."""
    if draft_head_of(network) is None:
        add_draft_head(network)


def train(
    run: Run[DecoderNetwork],
    rows: dict[str, TokenRows],
    exits: tuple[int, ...],
    settings: DraftHeadSettings,
) -> dict[str, Any]:
    """Train the draft head; return where ee-split cuts the model, and the accepted shares on dev."""
    prepare(run.network, exits, settings)  # for callers other than ee-train
    network = run.network.to(run.accelerator.device)
    train_rows = first_rows(rows["train"], rows["train"].lengths, settings.tokens)
    if left_out := len(rows["train"]) - len(train_rows):
        note(f"tokens={settings.tokens}: the last {left_out} of {len(rows['train'])} rows are not used")
    _fit(run, train_rows, settings)
    results: dict[str, Any] = {"exits": _cuts(network, exits)}
    if "dev" in rows:
        results["dev"] = measure_drafts(network, rows["dev"], settings.draft_ids)
    return results


def _cuts(network: DecoderNetwork, exits: tuple[int, ...]) -> list[int]:
    """Blocks after which segments end: exits of the model or, if not all blocks, those of --exits.

    Otherwise the last alone: the draft head needs no exit, and one segment is fastest.
    """
    if len(network.exits):
        return [*sorted(map(int, network.exits)), network.block_count]
    return list(exits) if len(exits) < network.block_count else [network.block_count]


def first_rows(rows: TokenRows, tokens: np.ndarray, limit: int) -> TokenRows:
    """The first rows with at most `limit` tokens in all, at least one row; tokens [rows]: those of each."""
    count = max(1, int((tokens.cumsum() <= limit).sum()))
    return TokenRows(rows.ids[:count], rows.starts[:count])


def _draft_head(network: DecoderNetwork) -> DraftHead:
    draft_head = draft_head_of(network)
    assert draft_head is not None  # added by prepare()
    return draft_head


@torch.no_grad()
def fit_join(network: DecoderNetwork, rows: TokenRows) -> None:
    """Fit the joining layer by ridge regression to what the model's last block reads at each token.

    It uses the first rows that give FIT_TOKENS tokens for each unknown, or all.
    """
    network.eval()
    draft_head, device = _draft_head(network), next(network.parameters()).device
    width = 2 * network.hidden_size + 1  # inputs, and a constant
    chosen = first_rows(rows, rows.lengths - np.array(rows.starts), FIT_TOKENS * width)
    squares = torch.zeros(width, width, dtype=torch.float64)
    products, count = torch.zeros(width, network.hidden_size, dtype=torch.float64), 0
    for index in track(list(sorted_batches(chosen.lengths, CACHE_BATCH)), "fitting", unit="batch"):
        ids, targets = chosen.batch(index, device)
        learned, states = targets != IGNORED, network(ids)
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        embedded = network.family.embed(network.model, ids, positions)
        before = normed_before(network, normed_hidden(network, states[-1]))
        inputs = draft_head.inputs(embedded, before)[learned]
        inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)  # [tokens, width]
        read = states[-2] if len(states) > 1 else embedded
        squares += (inputs.T @ inputs).cpu()
        products += (inputs.T @ read[learned]).cpu()
        count += len(inputs)
    squares += RIDGE * max(1, count) * torch.eye(width, dtype=torch.float64)
    solution = torch.linalg.solve(squares, products).float()
    draft_head.join.weight.copy_(solution[:-1].T)
    draft_head.join.bias.copy_(solution[-1])


class CachedStates:
    """The normed hidden states of all tokens of some rows after the last block, in a mapped file.

    states [tokens of all rows, hidden] float16; starts [rows + 1]: the first token of each row.
    """

    def __init__(self, states: np.ndarray, starts: np.ndarray) -> None:
        self.states, self.starts = states, starts

    @classmethod
    def compute(cls, run: Run[DecoderNetwork], rows: TokenRows) -> CachedStates:
        """Run the network on all rows that are not in the run's folder yet, by an earlier, killed run."""
        starts = np.concatenate([[0], rows.lengths.cumsum()])
        file = run.folder / f"states-{_fingerprint(run.network, rows)}.npy"
        if run.is_main_process and not file.is_file():
            _write_states(run, rows, starts, file)
        run.accelerator.wait_for_everyone()
        return cls(np.load(file, mmap_mode="r"), starts)

    def batch(self, index: np.ndarray) -> Tensor:
        """States float32 [batch, seq, hidden] of the rows at `index`, with zeros after shorter rows."""
        lengths = self.starts[index + 1] - self.starts[index]
        states = np.zeros((len(index), int(lengths.max()), self.states.shape[1]), np.float32)
        for place, (row, length) in enumerate(zip(index, lengths, strict=True)):
            states[place, :length] = self.states[self.starts[row] : self.starts[row] + length]
        return torch.from_numpy(states)


def _fingerprint(network: DecoderNetwork, rows: TokenRows) -> str:
    """A name for the states of these rows: of their ids, and of weights that are the model's own."""
    digest = hashlib.sha256(np.concatenate(rows.ids).astype(np.int64).tobytes())
    digest.update(rows.lengths.astype(np.int64).tobytes())
    last_weight = list(network.blocks[-1].parameters())[-1]
    for weight in (*network.family.norm(network.model).parameters(), last_weight):
        digest.update(weight.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _write_states(run: Run[DecoderNetwork], rows: TokenRows, starts: np.ndarray, file: Path) -> None:
    """Write the file of CachedStates; it gets its name when it is complete, and grows again after a kill."""
    network, device = run.network, run.accelerator.device
    network.eval()
    beside, counter = file.with_suffix(".writing"), file.with_suffix(".json")
    batches = list(sorted_batches(rows.lengths, CACHE_BATCH))
    done = int(read_json(counter)["batches"]) if counter.is_file() and beside.is_file() else 0
    shape, largest = (int(starts[-1]), network.hidden_size), torch.finfo(torch.float16).max
    states = np.lib.format.open_memmap(beside, "r+" if done else "w+", np.float16, None if done else shape)
    with progress("states", len(batches), unit="batch", done=done) as shown:
        for number, index in enumerate(batches[done:], done + 1):
            ids, _ = rows.batch(index, device)
            with run.accelerator.autocast():
                normed = normed_hidden(network, network(ids)[-1])
            values = normed.clamp(-largest, largest).half().cpu().numpy()  # an outlier becomes no infinity
            for place, row in enumerate(index):
                states[starts[row] : starts[row + 1]] = values[place, : starts[row + 1] - starts[row]]
            if number % SAVED_EVERY == 0:
                states.flush()
                write_json(counter, {"batches": number})
            shown.advance()
    states.flush()
    os.replace(beside, file)
    counter.unlink(missing_ok=True)


def draft_words(network: DecoderNetwork, draft_ids: int) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the head that drafts: those of the first ids of the model's head.

    As in ee-split, all ids are taken unless the vocabulary is twice as large.
    """
    words: nn.Linear = network.model.lm_head
    count = network.vocab_size if 2 * draft_ids > network.vocab_size else draft_ids
    return words.weight[:count], None if words.bias is None else words.bias[:count]


def _logits(network: DecoderNetwork, normed: Tensor, words: tuple[Tensor, Tensor | None]) -> Tensor:
    """Logits float32 [tokens, ids] of normed hidden states [tokens, hidden], by words of the head."""
    return cap(functional.linear(normed, *words).float(), network.softcap)


def _fit(run: Run[DecoderNetwork], rows: TokenRows, s: DraftHeadSettings) -> None:
    """Train the draft head on cached states, since the model is frozen and its states do not change."""
    if run.skip_finished_phase():
        return
    network, device = run.network, run.accelerator.device
    draft_head = _draft_head(network)
    if not draft_head.join.weight.any():  # neither restored from a state nor trained before
        fit_join(network, rows)
    states, step_weights = CachedStates.compute(run, rows), [STEP_DECAY**step for step in range(s.steps)]

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        ids, targets = rows.batch(index, device)
        normed, words = states.batch(index).to(device), draft_words(network, s.draft_ids)
        learned = targets != IGNORED
        with torch.no_grad():
            goal = _logits(network, normed[learned], words).softmax(-1)
        value, figures = torch.zeros((), device=device), dict[str, float]()
        predictions = predict_hidden(network, draft_head, ids, normed, s.steps, s.noise)
        for step, hidden in enumerate(predictions):
            chosen = learned.clone()
            chosen[:, :step] = False  # no draft of the step before has come so far
            step_goal, count = goal[chosen[learned]], max(1, int(chosen.sum()))
            predicted = normed_hidden(network, hidden[chosen]).float()
            feature = feature_loss(predicted, normed[chosen])
            logits = _logits(network, predicted, words)
            word = functional.cross_entropy(logits, step_goal, reduction="sum") / count
            agreeing = int((logits.argmax(-1) == step_goal.argmax(-1)).sum())
            figures[f"feature_{step + 1}"] = float(feature.detach())
            figures[f"word_{step + 1}"] = float(word.detach())
            figures[f"agrees_{step + 1}"] = agreeing / count
            weight = step_weights[step] / sum(step_weights)
            value = value + weight * (s.feature_weight * feature + word)
        return value, figures

    lengths, epochs, lr = rows.lengths, s.epochs, s.lr
    run.fit(Phase("draft head", (PREFIX,), lengths, loss, epochs, s.batch_size, lr, shared=False))


def feature_loss(predicted: Tensor, right: Tensor) -> Tensor:
    """Smooth L1 loss of normed states [tokens, hidden], in units of the size of each right one (RMS)."""
    size = right.square().mean(-1, keepdim=True).clamp_min(1e-12).sqrt()
    total = functional.smooth_l1_loss(predicted / size, right / size, reduction="sum")
    return total / max(1, right.numel())


@torch.no_grad()
def measure_drafts(
    network: DecoderNetwork, rows: TokenRows, draft_ids: int, steps: int = MEASURED_STEPS
) -> dict[str, Any]:
    """Draft after every learned token of the first DEV_ROWS rows, and compare with the model's own tokens.

    accepted [steps]: the share of drafts of each place in a row of drafts that the model predicts, too, of
    those whose drafts before were right, each of which is fed to the next. tokens_a_round: tokens that
    full depth gives a step if so many drafts are verified each time. tokens: first drafts in all. A row of
    drafts ends where the data go on with another token than the model predicts, or stop.
    """
    network.eval()
    draft_head, device = _draft_head(network), next(network.parameters()).device
    words, all_words = draft_words(network, draft_ids), draft_words(network, network.vocab_size)
    offered, right = [0] * steps, [0] * steps
    chosen = TokenRows(rows.ids[:DEV_ROWS], rows.starts[:DEV_ROWS])
    for index in track(list(sorted_batches(chosen.lengths, EVALUATION_BATCH)), "drafts", unit="batch"):
        ids, targets = chosen.batch(index, device)
        learned = targets != IGNORED
        normed = normed_hidden(network, network(ids)[-1])
        own, drafts = torch.full_like(ids, -1), torch.full_like(ids, -2)
        own[learned] = _logits(network, normed[learned], all_words).argmax(-1)
        goes_on = ids[:, 1:] == own[:, :-1]  # whether the token after a place is the model's own
        alive = learned  # places whose draft is compared
        for step, hidden in enumerate(predict_hidden(network, draft_head, ids, normed, steps)):
            drafts[alive] = _logits(network, normed_hidden(network, hidden[alive]), words).argmax(-1)
            agrees = alive & (drafts == own)
            offered[step] += int(alive.sum())
            right[step] += int(agrees.sum())
            alive = functional.pad(agrees[:, :-1] & goes_on, (1, 0)) & learned
    accepted = [good / max(1, drafted) for good, drafted in zip(right, offered, strict=True)]
    return {
        "tokens": offered[0],
        "accepted": [round(share, 4) for share in accepted],
        "tokens_a_round": round(1 + float(np.cumprod(accepted).sum()), 3),
    }
