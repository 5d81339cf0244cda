"""l2w_den: a small network predicts the weight of every row's loss at every exit (L2W-DEN, ECCV 2022).

Learning to Weight Samples for Dynamic Early-exiting Networks (arXiv 2209.08310). The weight network reads a
row's losses at all exits and gives its weights there, 1 + epsilon * v, where v is the output of tanh minus
its mean (see WeightNetwork); the exits and the backbone minimize the weighted losses. It is trained by
meta-learning. Half of the batch makes a pseudo step: one step of gradient descent on the weighted losses. On
the other half, rows then leave by their top probability under a quota of rows for every exit, proportional to
quota^l, and the meta loss is the sum over exits of the mean cross-entropy of the rows that leave there. Its
gradient flows through the pseudo step into the weights and the weight network, which Adam updates.

Seen: the abstract and the authors' code (LeapLabTHU/L2W-DEN, commit c49d575), not the paper's equations and
tables. The values of epsilon, centre, hidden, quota and meta_* are those of its command for CIFAR-100.

We differ: the pseudo step changes the exits' layers after pooling alone, in evaluation mode, with the
backbone's features of the same pass, so that a step costs little more than one of recipe joint; the code
copies the whole network and differentiates through its step. The pseudo step is plain gradient descent of
rate pseudo_lr (the code: the optimizer's rate and momentum; ours is AdamW). Both halves make one step of the
optimizer (the code: one each, with exchanged halves; ours take turns). Quotas are rounded on their running
sum with a random offset, so that in small batches every exit gets rows in proportion; the code rounds every
quota down, which with 16 rows and 12 exits leaves exits 6 to 11 without any. The losses are divided by the
number of exits. Rates, epochs and exits are those of recipe joint, and rows exit by their top probability at
one threshold for all exits (the code: one an exit, from quotas).

Expect: 1.01 times the CPU time of a step of recipe joint (12 blocks of width 384, 32 rows of 24 tokens), 1.03
with --head mlp; accuracy is not measured yet.

    ee-train --model MODEL --data DATA --recipe l2w_den --out ckpt/
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from offramp.models.network import EarlyExitNetwork, ExitParts
from offramp.training.batches import Encoded
from offramp.training.checkpoint import read_json
from offramp.training.collect import operating_points
from offramp.training.loop import Phase, Run
from offramp.training.losses import exit_losses
from offramp.training.recipes.cosee import fine_tune_first, refuse_joint_losses
from offramp.training.recipes.joint import EVERYTHING, JointSettings, loss_weights

CENTRES = ("row", "exit", "batch")


@dataclass(frozen=True)
class L2wDenSettings(JointSettings):
    """Settings of recipe joint and those of the weight network.

    epsilon: greatest change of a weight before centring; centre: one of CENTRES, see WeightNetwork; hidden:
    its width. quota: ratio of the quotas of an exit and of the one before. meta_*: learning rate and weight
    decay of the weight network, and steps from one of its updates to the next. pseudo_lr: rate of the pseudo
    step.
    """

    weights: str = "uniform"
    epsilon: float = 0.8
    centre: str = "row"
    hidden: int = 500
    quota: float = 0.75
    meta_lr: float = 1e-4
    meta_decay: float = 1e-4
    meta_interval: int = 1
    pseudo_lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centre not in CENTRES:
            raise ValueError(f"centre={self.centre}: choose one of {', '.join(CENTRES)}")
        if min(self.hidden, self.meta_interval) < 1 or min(self.epsilon, self.meta_decay) < 0:
            raise ValueError(f"hidden and meta_interval from 1; epsilon and meta_decay from 0: {self}")
        if min(self.quota, self.meta_lr, self.pseudo_lr) <= 0:
            raise ValueError(f"quota, meta_lr and pseudo_lr must be positive: {self}")
        refuse_joint_losses(self, "l2w_den", weights=False)


KIND: Literal["classifier"] = "classifier"
NEEDS_LABELS = True
SETTINGS = L2wDenSettings
STARTS_FROM: str | None = None


def parts_of(settings: L2wDenSettings) -> ExitParts:
    """The default parts, without a policy: the top probability decides."""
    return ExitParts()


class WeightNetwork(nn.Module):
    """Predicts the weights of every row's losses [batch, exits] from these losses.

    centre: whose weights are 1 on average: "row", those of every row (its sum is the number of exits);
    "exit", those of every exit; "batch", all of them.
    """

    def __init__(self, exits: int, hidden: int, epsilon: float, centre: str) -> None:
        super().__init__()
        self.epsilon, self.centre = epsilon, centre
        self.layers = nn.Sequential(nn.Linear(exits, hidden), nn.ReLU(), nn.Linear(hidden, exits), nn.Tanh())

    def forward(self, losses: Tensor) -> Tensor:
        """Predict weights [batch, exits]; losses [batch, exits]."""
        values: Tensor = self.layers(losses)
        means = {"row": values.mean(1, True), "exit": values.mean(0, True), "batch": values.mean()}
        return 1 + self.epsilon * (values - means[self.centre])


def exit_quotas(exits: int, ratio: float) -> Tensor:
    """The share of the rows that leave at each exit [exits], proportional to ratio^l; they sum to 1."""
    powers = ratio ** torch.arange(1, exits + 1, dtype=torch.float64)
    return powers / powers.sum()


def exits_by_quota(confidence: Tensor, quotas: Tensor, offset: float) -> Tensor:
    """The exit (0-based) at which each row leaves [batch]: at each exit the surest of the remaining rows do.

    confidence [batch, exits]. quotas [exits]: shares of the rows; by exit l, floor(rows * sum of quotas up to
    l + offset) rows have left, and all by the last. offset in 0..1; if it is drawn uniformly, the expected
    number of rows of an exit is its exact quota.
    """
    rows, exits = confidence.shape
    left = (rows * quotas.cumsum(0) + offset).floor().clamp(max=rows).int().tolist()
    taken = torch.full((rows,), exits - 1, device=confidence.device)
    remaining = torch.ones(rows, dtype=torch.bool, device=confidence.device)
    before = 0
    for index in range(exits - 1):
        order = confidence[:, index].masked_fill(~remaining, -1.0).argsort(descending=True)
        chosen = order[: left[index] - before]
        taken[chosen], remaining[chosen], before = index, False, left[index]
    return taken


def walk_loss(losses: Tensor, taken: Tensor) -> Tensor:
    """The sum over exits of the mean loss of the rows that leave there, a scalar.

    losses [batch, exits], taken [batch], 0-based. An exit at which no row leaves counts 0.
    """
    at_exit = functional.one_hot(taken, losses.shape[1]).to(losses.dtype)  # [batch, exits]
    return ((losses * at_exit).sum(0) / at_exit.sum(0).clamp(min=1)).sum()


def meta_loss(
    weight_network: WeightNetwork,
    exits: Sequence[nn.Module],
    halves: Sequence[tuple[Tensor, Tensor]],
    quotas: Tensor,
    pseudo_lr: float,
    offset: float = 0.5,
) -> Tensor:
    """The meta loss, a scalar whose gradient for the weight network flows through the pseudo step.

    exits: the network's, in evaluation mode; their parameters get no gradient. halves: pooled [rows, exits,
    hidden] and labels [rows], of the pseudo step and of the meta loss. quotas, offset: see exits_by_quota.
    """
    parameters = [_copy_of_layers(exit) for exit in exits]
    (pooled, labels), (meta_pooled, meta_labels) = halves
    losses = exit_losses(_all_logits(exits, parameters, pooled), labels)
    weighted = (weight_network(losses.detach()) * losses).mean(0).sum()
    leaves = [value for each in parameters for value in each.values()]
    gradients = iter(torch.autograd.grad(weighted, leaves, create_graph=True))
    stepped = [{name: p - pseudo_lr * next(gradients) for name, p in each.items()} for each in parameters]
    logits = _all_logits(exits, stepped, meta_pooled)
    taken = exits_by_quota(logits.detach().softmax(-1).amax(-1), quotas, offset)
    return walk_loss(exit_losses(logits, meta_labels), taken)


def _copy_of_layers(exit: nn.Module) -> dict[str, Tensor]:
    """The parameters of an exit's layers after pooling, by name, as new leaves."""
    named = exit.named_parameters()
    return {name: p.detach().requires_grad_() for name, p in named if not name.startswith("attention.")}


def _all_logits(
    exits: Sequence[nn.Module], parameters: Sequence[dict[str, Tensor]], pooled: Tensor
) -> Tensor:
    """Logits of all exits [rows, exits, classes] with these parameters; pooled [rows, exits, hidden]."""
    pairs = enumerate(zip(exits, parameters, strict=True))
    return torch.stack([functional_call(exit, p, (pooled[:, index],)) for index, (exit, p) in pairs], 1)


class MetaTraining:
    """The weight network, its optimizer, and their state in the folder of the run.

    The state is stored after every step, under the number of the next one. States are kept for the latest
    step and for the step from which a killed run would resume, so that it resumes with the same weights.
    """

    def __init__(self, run: Run[EarlyExitNetwork], settings: L2wDenSettings, total: int) -> None:
        self.run, self.settings, self.total = run, settings, total
        exits = len(run.network.spec.exits)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            network = WeightNetwork(exits, settings.hidden, settings.epsilon, settings.centre)
        self.network = network.to(run.accelerator.device)
        rate, decay = settings.meta_lr, settings.meta_decay
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=rate, weight_decay=decay)
        self.quotas = exit_quotas(exits, settings.quota)
        if run.position["step"]:
            self._restore(run.position["step"])

    def update(self, pooled: Tensor, labels: Tensor, step: int) -> float:
        """Train the weight network on one batch; gives the meta loss.

        pooled [batch, exits, hidden] without gradient, labels [batch]; even and odd rows are the halves.
        """
        halves = [(pooled[start::2].float(), labels[start::2]) for start in (step % 2, 1 - step % 2)]
        exits, offset = self.run.network.exits, float(torch.rand(()))
        exits.eval()  # without dropout, and the statistics of the standardization stay
        value = meta_loss(self.network, list(exits), halves, self.quotas, self.settings.pseudo_lr, offset)
        exits.train()
        parameters = list(self.network.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            parameter.grad = self.run.accelerator.reduce(gradient, reduction="mean")
        share = (1 + math.cos(math.pi * step / self.total)) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.meta_lr * share
        self.optimizer.step()
        return float(value.detach())

    def store(self, step: int) -> None:
        """Store the state with which a step begins, and remove states that no resumed run can need."""
        if not self.run.is_main_process:
            return
        tensors = {f"weights/{name}": value for name, value in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value
        file = self.run.folder / f"weight-network-{step}.safetensors"
        temporary = file.with_suffix(".writing")
        save_file({name: value.detach().cpu().clone() for name, value in tensors.items()}, temporary)
        os.replace(temporary, file)
        state = self.run.folder / "state.json"
        needed = {step, int(read_json(state)["step"]) if state.is_file() else 0}
        for stale in self.run.folder.glob("weight-network-*.safetensors"):
            if int(stale.stem.rpartition("-")[2]) not in needed:
                stale.unlink()

    def _restore(self, step: int) -> None:
        tensors = load_file(self.run.folder / f"weight-network-{step}.safetensors")
        parameters = dict(self.network.named_parameters())
        for key, value in tensors.items():
            slot, _, name = key.partition("/")
            parameter = parameters[name]
            if slot == "weights":
                parameter.data.copy_(value)
            else:  # the step counter stays on the CPU, where Adam keeps it
                place = "cpu" if slot == "step" else parameter.device
                self.optimizer.state[parameter][slot] = value.to(place)


def train(
    run: Run[EarlyExitNetwork],
    train: Encoded,
    dev: Encoded,
    settings: L2wDenSettings,
    *,
    skip_warm_start: bool,
) -> dict[str, Any]:
    """Train backbone, exits and weight network (with --init: further); return dev figures and points."""
    s, device = settings, run.accelerator.device
    fine_tune_first(run, train, s, skip_warm_start=skip_warm_start)
    total = math.ceil(len(train) / s.batch_size) * s.epochs // run.accelerator.num_processes
    meta = MetaTraining(run, s, total)

    def loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        inputs, labels = train.batch(index, device)
        outputs = model(inputs, gradient=s.gradient)
        step, figures = run.position["step"], dict[str, float]()
        with torch.autocast(device.type, enabled=False):  # small layers: bf16 would only lose precision
            losses = exit_losses(outputs.logits, labels)
            if step % s.meta_interval == 0 and len(index) > 1:
                figures["meta"] = meta.update(outputs.pooled.detach(), labels, step)
            meta.store(step + 1)
            with torch.no_grad():
                weights = meta.network(losses)
            shares = loss_weights(losses.mean(0), s.weights)
            figures["weight_deviation"] = float(weights.std())
            return (shares * (weights * losses).mean(0)).sum(), figures

    sizes = (s.batch_size, s.lr, s.heads_lr, s.warmup, s.weight_decay)
    run.fit(Phase("l2w_den", EVERYTHING, train.lengths, loss, s.epochs, *sizes))
    return operating_points(run, dev, "max_probability")
