"""Controllers: one linear layer a block tells of each token whether it runs the block or goes past it.

Of blocks 2 to the last but one; the first and the last always run (Glavas et al., arXiv 2410.20022).

We differ: hidden states are divided by their root mean square, since those of a llama grow a hundredfold
from block to block.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

INPUTS = ("hidden", "fixed")


class Controllers(nn.ModuleDict):
    """By block (1-based, as a word): hidden -> logits of running it and of going past it.

    input: hidden reads the hidden state that enters the block, and does not train what made it; fixed reads
    ones, the same for all tokens: the control that knows no token. start: logit of running before training.
    """

    def __init__(self, blocks: int, hidden_size: int, *, input: str = "hidden", start: float = 2.0) -> None:
        if blocks < 3:
            raise ValueError(f"of {blocks} blocks the first and the last always run: none is left to control")
        if input not in INPUTS:
            raise ValueError(f"input={input}: choose among {', '.join(INPUTS)}")
        made = {str(block): nn.Linear(hidden_size, 2) for block in range(2, blocks)}
        for linear in made.values():
            nn.init.zeros_(linear.weight)
            nn.init.constant_(linear.bias, 0.0)
            linear.bias.data[0] = start
        super().__init__(made)
        self.input = input

    def logits(self, block: int, hidden: Tensor) -> Tensor:
        """Of one block (1-based): [..., 2] for hidden [..., hidden]."""
        hidden = hidden.detach().float()
        if self.input == "fixed":
            read = torch.ones_like(hidden)
        else:
            read = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        told: Tensor = self[str(block)](read)
        return told

    def drawn(self, block: int, hidden: Tensor, tau: float) -> Tensor:
        """1 for tokens that run the block, 0 for others [batch, seq]: a draw with noise, whose gradient is
        that of the soft draw at temperature tau (straight-through Gumbel softmax).
        """
        draw = functional.gumbel_softmax(self.logits(block, hidden), tau=tau, hard=True)
        return draw[..., 0]

    def margin(self, block: int, hidden: Tensor) -> Tensor:
        """How much rather each token runs the block than goes past it [batch, seq]; it runs where above 0."""
        logits = self.logits(block, hidden)
        return logits[..., 0] - logits[..., 1]

    @torch.no_grad()
    def settle(self) -> None:
        """Of a fixed input only what it comes to is kept, as biases: it then reads anything, to no effect."""
        if self.input == "hidden":
            return
        for linear in self.values():
            assert isinstance(linear, nn.Linear)
            linear.bias.add_(linear.weight.sum(1))
            linear.weight.zero_()


def controllers_of(network: nn.Module) -> Controllers | None:
    """Those that a network carries, if any."""
    found = getattr(network, "controllers", None)
    return found if isinstance(found, Controllers) else None


def load_controllers(state: Mapping[str, Tensor], blocks: int, hidden_size: int) -> Controllers:
    """Settled controllers from tensors by name, of which others than "controllers.…" are ignored; raises
    ValueError where they are not those of such a network.
    """
    own = {name[12:]: value for name, value in state.items() if name.startswith("controllers.")}
    made = Controllers(blocks, hidden_size)
    try:
        made.load_state_dict(own)
    except RuntimeError as problem:
        raise ValueError(f"no controllers of {blocks} blocks by {hidden_size}: {problem}") from problem
    return made
