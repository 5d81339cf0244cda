"""Early stopping for each exit by itself: its best weights by accuracy on dev, and whether it learns on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from offramp.training.collect import Collected
from offramp.training.frozen import early_logits
from offramp.training.loop import Run


class BestExits:
    """The exits but the last, judged on dev after every epoch (0: before the first).

    An exit has stopped once `patience` epochs in a row brought no better accuracy. Accuracies and weights are
    remembered by the run, so that a resumed run judges as the uninterrupted one.
    """

    def __init__(self, run: Run, dev: Collected, *, patience: int, name: str) -> None:
        self.run, self.dev, self.patience, self.name = run, dev, patience, name
        self.exits = list(run.network.exits)[:-1]
        self.accuracy: list[Tensor] = []  # an epoch: [exits - 1]

    def judge(self, epoch: int) -> None:
        """Judge every epoch up to `epoch` that has not been; those before it must be remembered."""
        for number in range(len(self.accuracy), epoch + 1):
            self.accuracy.append(self.run.remember(f"{self.name}-{number}-accuracy", self._measure))
            self.run.remember(
                f"{self.name}-{number}-exits", lambda: torch.stack(list(map(_flat, self.exits)))
            )

    @property
    def best(self) -> Tensor:
        """The epoch with each exit's best accuracy, the first of equals [exits - 1]."""
        return torch.stack(self.accuracy).argmax(0)

    @property
    def learning(self) -> Tensor:
        """Whether each exit still learns [exits - 1]."""
        return len(self.accuracy) - 1 - self.best < self.patience

    def restore(self) -> None:
        """Give every exit its best weights."""
        for index, epoch in enumerate(self.best.tolist()):
            weights = self.run.remember(f"{self.name}-{epoch}-exits", self._measure)[index]
            values = list(self.exits[index].state_dict().values())
            with torch.no_grad():
                for value, part in zip(values, weights.split([v.numel() for v in values]), strict=True):
                    value.copy_(part.view_as(value))

    @torch.no_grad()
    def _measure(self) -> Tensor:
        device = self.run.accelerator.device
        learns = self.run.network.training
        self.run.network.eval()
        said = early_logits(self.run.network, self.dev.pooled.to(device)).argmax(-1).cpu()
        self.run.network.train(learns)
        return (said == self.dev.labels[:, None]).float().mean(0)


def _flat(module: nn.Module) -> Tensor:
    """All that a module remembers as one row of numbers."""
    return torch.cat([value.detach().flatten().float().cpu() for value in module.state_dict().values()])
