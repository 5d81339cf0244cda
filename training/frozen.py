"""Exits on a frozen backbone: its outputs are computed once, and the exits train on them in seconds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from offramp.models.network import EarlyExitNetwork
from offramp.training.collect import Collected
from offramp.training.loop import Phase, Run

# (logits of the exits but the last [batch, exits - 1, classes], row numbers [batch]) -> scalar
ExitsLoss = Callable[[Tensor, Tensor], Tensor]


def early_logits(network: EarlyExitNetwork, pooled: Tensor) -> Tensor:
    """Compute logits of the exits but the last [batch, exits - 1, classes] from pooled [batch, exits,
    hidden].
    """
    return network.classify_all(pooled[:, :-1])


def exits_phase(
    run: Run[EarlyExitNetwork],
    collected: Collected,
    loss: ExitsLoss,
    *,
    name: str,
    epochs: int,
    batch_size: int,
    lr: float,
) -> Phase:
    """A phase that trains the exits but the last on collected features; the last exit is not called.

    loss: (logits of these exits [batch, exits - 1, classes], row numbers [batch]) -> scalar.
    """
    device = run.accelerator.device

    def batch_loss(model: nn.Module, index: np.ndarray) -> tuple[Tensor, dict[str, float]]:
        rows = torch.from_numpy(index)
        with torch.autocast(device.type, enabled=False):  # one linear layer: bf16 would only lose precision
            return loss(early_logits(run.network, collected.pooled[rows].to(device)), rows), {}

    lengths = np.zeros(len(collected.labels), np.int64)  # features have no length
    return Phase(name, ("exits",), lengths, batch_loss, epochs, batch_size, lr, shared=False)


def reset_early_exits(network: EarlyExitNetwork, seed: int) -> None:
    """Give the exits but the last new random weights by `seed`; their standardization is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for exit in list(network.exits)[:-1]:
            for layer in (exit.dense, exit.classify):
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()


class EarlyStopping:
    """Early stopping of each exit but the last on its own, by its accuracy on dev after every epoch.

    Epoch 0 is the state before training. An exit has stopped after `patience` epochs in a row without a
    better accuracy. Accuracies and weights are stored by the run, so that a resumed run makes the same
    decisions as an uninterrupted one.
    """

    def __init__(self, run: Run[EarlyExitNetwork], dev: Collected, *, patience: int, name: str) -> None:
        self.run, self.dev, self.patience, self.name = run, dev, patience, name
        self.exits = list(run.network.exits)[:-1]
        self.accuracy: list[Tensor] = []  # by epoch [exits - 1]

    def evaluate(self, epoch: int) -> None:
        """Evaluate every epoch up to `epoch` that is not evaluated yet; the run has stored earlier ones."""
        for number in range(len(self.accuracy), epoch + 1):
            self.accuracy.append(self.run.compute_once(f"{self.name}-{number}-accuracy", self._measure))
            self.run.compute_once(
                f"{self.name}-{number}-exits", lambda: torch.stack(list(map(_state_vector, self.exits)))
            )

    @property
    def best_epoch(self) -> Tensor:
        """The epoch with each exit's best accuracy [exits - 1], the first among equal ones."""
        return torch.stack(self.accuracy).argmax(0)

    @property
    def active(self) -> Tensor:
        """Whether each exit still trains [exits - 1]."""
        return len(self.accuracy) - 1 - self.best_epoch < self.patience

    def restore_best(self) -> None:
        """Set every exit to its best weights."""
        for index, epoch in enumerate(self.best_epoch.tolist()):
            weights = self.run.compute_once(f"{self.name}-{epoch}-exits", self._measure)[index]
            values = list(self.exits[index].state_dict().values())
            with torch.no_grad():
                for value, part in zip(values, weights.split([v.numel() for v in values]), strict=True):
                    value.copy_(part.view_as(value))

    @torch.no_grad()
    def _measure(self) -> Tensor:
        device = self.run.accelerator.device
        was_training = self.run.network.training
        self.run.network.eval()
        predictions = early_logits(self.run.network, self.dev.pooled.to(device)).argmax(-1).cpu()
        self.run.network.train(was_training)
        return (predictions == self.dev.labels[:, None]).float().mean(0)


def _state_vector(module: nn.Module) -> Tensor:
    """The whole state of a module as one vector [values]."""
    return torch.cat([value.detach().flatten().float().cpu() for value in module.state_dict().values()])
