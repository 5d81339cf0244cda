"""Controllers: one linear layer for each block decides for each token whether it runs or skips the block.

They control blocks 2 to the last but one; the first and the last always run (Glavas et al., arXiv
2410.20022).

We differ: hidden states are divided by their root mean square, because those of a Llama grow a hundredfold
from the first block to the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

INPUTS = ("hidden", "fixed")


class Controllers(nn.ModuleDict):
    """The controllers of a network: for each controlled block one linear layer, hidden -> logits of run and
    skip.

    Keys are block numbers (1-based, as strings). input: "hidden" reads the hidden state before the block,
    detached; "fixed" reads ones for every token, the control experiment without knowledge of the token.
    start: logit of running before training.
    """

    def __init__(self, blocks: int, hidden_size: int, *, input: str = "hidden", start: float = 2.0) -> None:
        if blocks < 3:
            raise ValueError(f"of {blocks} blocks the first and the last always run: none is left to control")
        if input not in INPUTS:
            raise ValueError(f"input={input}: choose among {', '.join(INPUTS)}")
        layers = {str(block): nn.Linear(hidden_size, 2) for block in range(2, blocks)}
        for linear in layers.values():
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, 0.0)
            linear.bias.data[0] = start
        super().__init__(layers)
        self.input = input

    def logits(self, block: int, hidden: Tensor) -> Tensor:
        """The logits of running and of skipping a block (1-based) [..., 2]; hidden [..., hidden]."""
        features = features_of(hidden.detach().float(), fixed=self.input == "fixed")
        logits: Tensor = self[str(block)](features)
        return logits

    def sample(self, block: int, hidden: Tensor, tau: float) -> Tensor:
        """Sample for each token whether it runs the block: 1 to run, 0 to skip [batch, seq].

        The gradient is that of the soft sample at temperature tau (straight-through Gumbel softmax).
        """
        one_hot = functional.gumbel_softmax(self.logits(block, hidden), tau=tau, hard=True)
        return one_hot[..., 0]

    def margin(self, block: int, hidden: Tensor) -> Tensor:
        """The logit of running minus that of skipping the block [batch, seq]; a token runs it if above 0."""
        logits = self.logits(block, hidden)
        return logits[..., 0] - logits[..., 1]

    @torch.no_grad()
    def fold_fixed_input(self) -> None:
        """Move the weights of controllers with fixed input into the biases, so that any input gives their
        logits.
        """
        if self.input == "hidden":
            return
        for linear in self.values():
            assert isinstance(linear, nn.Linear)
            linear.bias.add_(linear.weight.sum(1))
            linear.weight.zero_()


class ControllersAhead(nn.Module):
    """P(run) of all controlled blocks ahead of a block, from the hidden state after it.

    A block that a token skips leaves its hidden state as it is, so the controllers of all blocks up to the
    next that it runs read the same one, and one product computes them.
    """

    def __init__(self, controllers: Controllers, block: int) -> None:
        """Copy the controllers of the blocks after `block` (1-based), of which there must be one at least."""
        super().__init__()
        linears = [controllers[name] for name in sorted(controllers, key=int) if int(name) > block]
        weights = [cast(nn.Linear, linear) for linear in linears]
        self.fixed = controllers.input == "fixed"
        self.margin = nn.Linear(weights[0].in_features, len(weights))
        with torch.no_grad():
            self.margin.weight.copy_(torch.stack([w.weight[0] - w.weight[1] for w in weights]))
            self.margin.bias.copy_(torch.stack([w.bias[0] - w.bias[1] for w in weights]))

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute P(run) [..., blocks ahead] in order of the blocks; hidden [..., hidden]."""
        probabilities: Tensor = self.margin(features_of(hidden, fixed=self.fixed)).sigmoid()
        return probabilities


def features_of(hidden: Tensor, *, fixed: bool) -> Tensor:
    """What a controller reads of hidden states [..., hidden], in the same shape; fixed: ones alone."""
    if fixed:
        return torch.ones_like(hidden)
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)


def controllers_of(network: nn.Module) -> Controllers | None:
    """The controllers of a network, or None if it has none."""
    controllers = getattr(network, "controllers", None)
    return controllers if isinstance(controllers, Controllers) else None


def controllers_after(network: nn.Module, block: int) -> ControllersAhead | None:
    """The controllers of the blocks after `block` (1-based); None if the network has none there."""
    controllers = controllers_of(network)
    if controllers is None or all(int(name) <= block for name in controllers):
        return None
    return ControllersAhead(controllers, block)


def run_probabilities(network: nn.Module, block: int, hidden: Tensor) -> Tensor:
    """P(run) [..., blocks] of the controlled blocks after `block` (1-based), from each controller's logits.

    hidden [..., hidden]: after that block. Raises ValueError for a network without controllers.
    """
    if (controllers := controllers_of(network)) is None:
        raise ValueError("the network has no controllers")
    ahead = sorted(int(name) for name in controllers if int(name) > block)
    return torch.stack([controllers.margin(number, hidden).sigmoid() for number in ahead], -1)


def load_controllers(state: Mapping[str, Tensor], blocks: int, hidden_size: int) -> Controllers:
    """Create trained controllers from tensors by name.

    Names that do not begin with "controllers." are ignored. Raises ValueError if the tensors do not fit a
    network of this size.
    """
    prefix = "controllers."
    weights = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    controllers = Controllers(blocks, hidden_size)
    try:
        controllers.load_state_dict(weights)
    except RuntimeError as problem:
        raise ValueError(f"no controllers of {blocks} blocks by {hidden_size}: {problem}") from problem
    return controllers
