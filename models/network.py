"""A backbone with exits after chosen blocks and a policy at every exit but the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from optimum.utils import NormalizedConfigManager
from torch import Tensor, nn

from offramp.models.exits import (
    HEADS,
    POOLINGS,
    AttentionPool,
    Exit,
    Pooler,
    patch_weights,
    pool_tokens,
    pooling_weights,
)
from offramp.models.families import Family, family_of
from offramp.models.families.family import Context, additive_mask
from offramp.models.forecasts import INPUTS, Forecast
from offramp.models.own_head import OwnHead, empty_own_head
from offramp.models.policies import KINDS
from offramp.models.precision import PRECISIONS
from offramp.models.tasks import (
    CLASSIFICATION,
    EMBEDDING,
    MULTI_LABEL,
    REGRESSION,
    TASKS,
    certainty_logits,
    threshold_logits,
    unit_length,
    words_mask,
)

if TYPE_CHECKING:  # a slow import, needed for annotations only
    from transformers import PreTrainedConfig, PreTrainedModel


GRADIENTS = ("full", "equilibrium", "next_exit")


@dataclass(frozen=True)
class ExitParts:
    """The parts of a network's exits, which a recipe chooses; the fields are those of NetworkSpec."""

    policy: str | None = None
    pooling: str = "mean"
    head: str = "linear"
    ensemble: bool = False


@dataclass(frozen=True)
class NetworkSpec:
    """The parts of a network on top of its backbone, which its transformers configuration describes.

    exits: 1-based blocks that are followed by an exit, ascending, the last block among them.
    labels: names of the labels; empty for tasks without labels.
    pooling: "mean" over tokens (of an image: over its patches); "attention", a weighted mean whose weights
    each exit learns; "cls", the first token, followed by BERT's shared dense-and-tanh pooler if the backbone
    reads text; or "none" for a task whose exits read each token.
    head: what an exit is after pooling: "linear", or "mlp" with a layer of the hidden size in between.
    ensemble: whether an exit's logits are those of a learned ensemble of all exits so far, see Exit.join.
    policy: the kind of the policies, a name in offramp.models.policies.KINDS, or None for a network without
    policies.
    forecast: precisions between which error forecasts choose, the default first; empty: no forecasts.
    forecast_inputs: what they read, a name in offramp.models.forecasts.INPUTS.
    own_head: whether the last exit is the head that the user's model brought, see models.own_head.
    task: what the exits give, a name in models.tasks.TASKS. thresholds: for several labels a row, the
    probability from which each label is given; empty: a half. embedding_pooling: the pooling of the model's
    own embedding, "mean" or "first". unit: whether embeddings have unit length.
    """

    labels: tuple[str, ...]
    exits: tuple[int, ...]
    pooling: str = "mean"
    policy: str | None = None
    dropout: float = 0.1
    forecast: tuple[str, ...] = ()
    head: str = "linear"
    ensemble: bool = False
    forecast_inputs: str = "statistics"
    own_head: bool = False
    task: str = CLASSIFICATION
    thresholds: tuple[float, ...] = ()
    embedding_pooling: str = "mean"
    unit: bool = True

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r}; choose one of {', '.join(TASKS)}")
        task = TASKS[self.task]
        if len(self.labels) < task.least_labels:
            raise ValueError(f"{self.task} needs {task.least_labels} labels or more, got {list(self.labels)}")
        if self.labels and not task.least_labels:
            raise ValueError(f"{self.task} has no labels, got {list(self.labels)}")
        if self.thresholds and (self.task != MULTI_LABEL or len(self.thresholds) != len(self.labels)):
            raise ValueError(f"thresholds {list(self.thresholds)}: {MULTI_LABEL} has one for each label")
        poolings = ("none",) if task.per_token else POOLINGS
        if self.pooling not in poolings:
            raise ValueError(f"pooling {self.pooling!r}; for {self.task} choose one of {', '.join(poolings)}")
        if self.task != CLASSIFICATION and (self.policy is not None or self.forecast):
            raise ValueError(f"{self.task}: policies and error forecasts are for {CLASSIFICATION}")
        if self.ensemble and not task.least_labels:
            raise ValueError(f"{self.task}: an ensemble joins logits of labels, and there are none")
        if self.head not in HEADS:
            raise ValueError(f"head {self.head!r}; choose one of {', '.join(HEADS)}")
        if self.policy is not None and self.policy not in KINDS:
            raise ValueError(f"policy {self.policy!r}; choose one of {', '.join(KINDS)}, or none")
        if not self.exits or list(self.exits) != sorted(set(self.exits)) or self.exits[0] < 1:
            raise ValueError(f"exits must be ascending block numbers from 1, got {list(self.exits)}")
        unknown = [name for name in self.forecast if name not in PRECISIONS]
        if unknown or len(set(self.forecast)) != len(self.forecast):
            known = ", ".join(PRECISIONS)
            raise ValueError(f"forecast {list(self.forecast)}: expected precisions among {known}, each once")
        if self.forecast_inputs not in INPUTS:
            raise ValueError(f"forecast_inputs {self.forecast_inputs!r}; choose one of {', '.join(INPUTS)}")


@dataclass(frozen=True)
class WalkOutputs:
    """The outputs of every exit of a network that ran at full depth, exits in order.

    logits [batch, exits, classes]: what the exits give, also where the task has no classes; pooled [batch,
    exits, hidden]; gate_logits [batch, exits - 1]: logits of P(exit), or None without policies. Where exits
    read each token, all words of the batch stand in place of its rows, row by row: the tokens that begin one.
    """

    logits: Tensor
    pooled: Tensor
    gate_logits: Tensor | None


def share_gradient(hidden: Tensor, exits: int, gradient: str) -> tuple[Tensor, Tensor]:
    """A hidden state as its exit reads it and as the next block reads it; only their gradients differ.

    exits: number of exits from this one on. gradient: "full" adds up the gradients of all exits;
    "equilibrium" averages them, so that no block gets a larger one because more exits follow (Li et al.,
    arXiv 1908.06294); "next_exit" keeps that of the next exit alone (SWEET, arXiv 2306.02307).
    """
    if gradient == "next_exit":
        return hidden, hidden.detach()
    if gradient == "equilibrium":
        share = 1 / exits
        return _scale_gradient(hidden, share), _scale_gradient(hidden, 1 - share)
    return hidden, hidden


def _scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The same values, whose gradient is multiplied by a factor."""
    return tensor.detach() + (tensor - tensor.detach()) * factor


class EarlyExitNetwork(nn.Module):
    """A transformers encoder of text or of images with exits and policies.

    backbone: the base model that AutoModel loads (its own pooler, if any, only initializes the shared one).
    own_head: the last exit, if the specification says so; None: one whose weights are to be loaded. Raises
    UnsupportedFamily if there is no adapter for the backbone, ValueError if the last exit does not follow its
    last block.
    """

    value_mean: Tensor | None
    value_spread: Tensor | None

    def __init__(self, backbone: PreTrainedModel, spec: NetworkSpec, own_head: OwnHead | None = None) -> None:
        super().__init__()
        self.family: Family = family_of(backbone.config.model_type)
        self.spec = spec
        config, text = backbone.config, self.family.vision is None
        self.hidden_size = _config_size(config, "hidden_size", "hidden_size")
        self.vocab_size = _config_size(config, "vocab_size", "vocab_size") if text else 0
        self.block_count = count_blocks(config)
        self.longest = self.family.longest(backbone.config)
        if spec.exits[-1] != self.block_count:
            raise ValueError(
                f"the last exit must follow the last block {self.block_count}, got {list(spec.exits)}"
            )
        self.task = TASKS[spec.task]
        if self.task.per_token and not text:
            raise ValueError(f"{spec.task} is for text; {backbone.config.model_type} reads images")
        self.outputs = self.task.outputs(len(spec.labels), self.hidden_size)
        shared = spec.pooling == "cls" and text
        self.pooler = _shared_pooler(backbone, self.hidden_size) if shared else None
        backbone.pooler = None  # type: ignore[assignment]  # never called: exits pool for themselves
        self.backbone = backbone
        self.exits = nn.ModuleList(
            Exit(
                self.hidden_size,
                self.outputs,
                spec.dropout,
                spec.head,
                AttentionPool(self.hidden_size) if spec.pooling == "attention" else None,
                ensemble=spec.ensemble,
            )
            for _ in spec.exits
        )
        if spec.own_head:
            self.exits[-1] = own_head or self._empty_own_head()
        has_values = spec.task == REGRESSION  # its exits learn values of mean 0 and spread 1
        self.register_buffer("value_mean", torch.zeros(()) if has_values else None)
        self.register_buffer("value_spread", torch.ones(()) if has_values else None)
        self.policies = nn.ModuleList()
        if spec.policy is not None:
            self.policies = KINDS[spec.policy].make(self.hidden_size, len(spec.exits) - 1)
        self.forecasts = nn.ModuleList()
        if spec.forecast:
            exits_ahead = range(len(spec.exits) - 1, 0, -1)
            count, inputs = len(spec.forecast), spec.forecast_inputs
            self.forecasts.extend(Forecast(count, ahead, inputs, self.hidden_size) for ahead in exits_ahead)

    def _empty_own_head(self) -> OwnHead:
        """The own head of the specification; its weights are to be loaded."""
        if self.spec.task == EMBEDDING:
            return OwnHead(self.spec.embedding_pooling, (), self.spec.dropout)
        return empty_own_head(self.config, self.spec.dropout, per_token=self.task.per_token)

    @property
    def config(self) -> PreTrainedConfig:
        """The backbone's transformers configuration."""
        return self.backbone.config

    @property
    def blocks(self) -> nn.ModuleList:
        """The backbone's blocks in order."""
        return self.family.blocks(self.backbone)

    @property
    def norm(self) -> nn.Module | None:
        """The norm that is applied to a block's output before an exit reads it, or None."""
        return self.family.exit_norm(self.backbone)

    def zero_inputs(self, rows: int, length: int) -> dict[str, Tensor]:
        """Stem inputs filled with zeros: texts of `length` tokens, or images, which have only one size."""
        if self.family.vision is not None:
            return {"pixel_values": torch.zeros(rows, *self.family.vision.shape(self.config))}
        ids = torch.zeros(rows, length, dtype=torch.int64)
        ones = ("attention_mask", "word_starts") if self.task.per_token else ("attention_mask",)
        return {name: torch.ones_like(ids) for name in ones} | {name: ids for name in self.family.inputs}

    def stem(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Context]:
        """Embed a batch of texts or images; gives hidden [batch, seq, hidden] and the tensors of the context.

        inputs: input_ids (and token_type_ids) with attention_mask, for exits that read each token also
        word_starts, each [batch, seq], or pixel_values [batch, channels, height, width]. The context has the
        tensors that every segment reads: for text the mask [batch, 1, 1, seq], additive; pool, with mean
        pooling [batch, 1, seq], for images [1, 1, seq], with attention pooling of text the mask as [batch, 1,
        seq]; words, see tasks.words_mask, for exits that read each token; and those of the family.
        """
        hidden = self.family.embed(self.backbone, inputs)
        context: Context = {}
        mean = self.spec.pooling == "mean"
        if self.family.vision is None:
            context["mask"] = additive_mask(inputs["attention_mask"])
            if mean:
                context["pool"] = pooling_weights(inputs["attention_mask"])
            elif self.spec.pooling == "attention":
                context["pool"] = context["mask"].squeeze(1)
            if self.task.per_token:
                context["words"] = words_mask(inputs["word_starts"])
        elif mean:
            context["pool"] = patch_weights(hidden, self.family.vision.prefix(self.config))
        context.update(self.family.context(self.backbone, hidden))
        return hidden, context

    def run_block(self, block: int, hidden: Tensor, context: Context) -> Tensor:
        """Run one block (0-based) on hidden [batch, seq, hidden]; gives hidden of the same shape."""
        return self.family.run_block(self.blocks[block], hidden, context)

    def pooled(self, exit_index: int, hidden: Tensor, context: Context) -> Tensor:
        """Pool a block's hidden state into the vector [batch, hidden] that its exit and policy read.

        A model's own head may read a wider one. Where exits read each token, it is the hidden state itself
        [batch, seq, hidden], after the norm.
        """
        exit_head = self.exits[exit_index]
        parts = exit_head.attention, self.pooler, exit_head.own_pool
        return pool_tokens(hidden, context, self.norm, *parts, per_token=self.task.per_token)  # type: ignore[arg-type]

    def classify(self, exit_index: int, pooled: Tensor, before: Tensor | None = None) -> Tensor:
        """What one exit (0-based) gives [batch, outputs], such as logits; pooled [batch, hidden].

        before: the logits of the exit before it, which an ensemble reads; None at the first exit. Both may
        have more axes before the last one.
        """
        exit_head = self.exits[exit_index]
        given: Tensor = exit_head.join(exit_head(pooled), before)  # type: ignore[operator]
        return self.in_units(exit_index, given)

    def in_units(self, exit_index: int, given: Tensor) -> Tensor:
        """What an exit gives, in the units of the task: values in those of the data, embeddings of length 1.

        given: as the exit's own layers compute it.
        """
        own = self.exits[exit_index].own_pool is not None  # a model's own head is trained in these units
        if self.value_mean is not None and self.value_spread is not None and not own:
            return given * self.value_spread + self.value_mean
        return unit_length(given) if self.spec.task == EMBEDDING and self.spec.unit else given

    def rule_logits(self, given: Tensor, words: Tensor | None) -> Tensor | None:
        """The logits that rules read [batch, classes], from what an exit gives; None if it has no labels.

        given: as classify returns it. words: those of the context, where exits read each token.
        """
        if self.task.certainty is None:
            return given if self.task.least_labels else None
        return certainty_logits(self.task.certainty(given, words, threshold_logits(self.spec.thresholds)))

    def classify_all(self, pooled: Tensor) -> Tensor:
        """The logits [batch, exits, classes] of the first exits; pooled [batch, exits, hidden]."""
        logits: list[Tensor] = []
        for index in range(pooled.shape[1]):
            logits.append(self.classify(index, pooled[:, index], logits[-1] if logits else None))
        return torch.stack(logits, 1)

    @property
    def evidence_size(self) -> int:
        """How many numbers a row are passed from each policy to the next as evidence; 0 for none."""
        kind = self.spec.policy
        return 0 if kind is None else KINDS[kind].evidence(len(self.spec.labels))

    def no_evidence(self, rows: Tensor) -> Tensor | None:
        """The evidence for the first policy: zeros [batch, numbers], or None if this kind has none.

        rows: any tensor with the batch first.
        """
        size = self.evidence_size
        return torch.zeros(rows.shape[0], size, device=rows.device) if size else None

    def gate_logit(
        self, exit_index: int, pooled: Tensor, logits: Tensor, evidence: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The logit of P(exit) [batch] at one exit (0-based, not the last), and the evidence for the next."""
        return self.policies[exit_index](pooled, logits, evidence)  # type: ignore[no-any-return]

    def gate_logits(self, pooled: Tensor, logits: Tensor) -> Tensor:
        """The logits of P(exit) at all exits but the last [batch, exits - 1].

        pooled [batch, exits, hidden], logits [batch, exits, classes].
        """
        evidence, columns = self.no_evidence(logits), []
        for index in range(len(self.policies)):
            column, evidence = self.gate_logit(index, pooled[:, index], logits[:, index], evidence)
            columns.append(column)
        return torch.stack(columns, dim=1)

    def forward(
        self, inputs: Mapping[str, Tensor], *, detach_policies: bool = False, gradient: str = "full"
    ) -> WalkOutputs:
        """Run a batch at full depth and compute every exit.

        detach_policies: no gradient flows from the gates into exits and backbone. gradient: one of GRADIENTS,
        see share_gradient.
        """
        hidden, context = self.stem(inputs)
        pooled, logits = list[Tensor](), list[Tensor]()
        begins_word = inputs["word_starts"].bool() if self.task.per_token else None  # [batch, seq]
        for block in range(self.block_count):
            hidden = self.run_block(block, hidden, context)
            if block + 1 in self.spec.exits:
                for_exit, hidden = share_gradient(hidden, len(self.spec.exits) - len(pooled), gradient)
                vector = self.pooled(len(pooled), for_exit, context)
                if begins_word is not None:
                    vector = vector[begins_word]  # [words of the batch, hidden]
                pooled.append(vector)
                logits.append(self.classify(len(pooled) - 1, vector, logits[-1] if logits else None))
        # An own head may read more than one vector: the first one is kept, since nothing reads the last.
        all_pooled = torch.stack([vector[:, : self.hidden_size] for vector in pooled], 1)
        all_logits = torch.stack(logits, 1)
        gate_logits = None
        if len(self.policies):
            policy_inputs = all_pooled.float(), all_logits.float()
            if detach_policies:
                policy_inputs = policy_inputs[0].detach(), policy_inputs[1].detach()
            gate_logits = self.gate_logits(*policy_inputs)
        return WalkOutputs(all_logits, all_pooled, gate_logits)


def default_exits(blocks: int) -> tuple[int, ...]:
    """The exits of a network with one after every block: 1 to `blocks`."""
    return tuple(range(1, blocks + 1))


def count_blocks(config: PreTrainedConfig) -> int:
    """The number of blocks by a supported configuration; raises UnsupportedFamily for others."""
    family_of(config.model_type)
    return _config_size(config, "num_layers", "num_hidden_layers")


def parse_exits(option: str | Sequence[int], blocks: int) -> tuple[int, ...]:
    """Parse exits from "each", "every N", or a list such as "2,4,6"; the last block is always added.

    Raises ValueError for other text and for blocks that do not exist.
    """
    if not isinstance(option, str):
        exits = set(option)
    elif option == "each":
        exits = set(default_exits(blocks))
    else:
        words = option.replace("every", " ").replace(",", " ").split()
        if not words or not all(word.isdigit() and int(word) > 0 for word in words):
            raise ValueError(f"{option!r}: say 'each', 'every N', or block numbers such as 2,4,6")
        numbers = [int(word) for word in words]
        every = option.strip().startswith("every")
        if every and len(numbers) != 1:
            raise ValueError(f"{option!r}: 'every' takes one number")
        exits = set(range(numbers[0], blocks + 1, numbers[0])) if every else set(numbers)
    beyond = [number for number in exits if not 1 <= number <= blocks]
    if beyond:
        raise ValueError(f"block {beyond[0]} does not exist: the backbone has blocks 1 to {blocks}")
    return tuple(sorted(exits | {blocks}))


def _config_size(config: PreTrainedConfig, name: str, usual_name: str) -> int:
    """A size by optimum's name for it or, if optimum's table lacks the type or the size, by the usual one."""
    try:
        sizes = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError:  # a type that optimum does not know
        return int(getattr(config, usual_name))
    return int(getattr(sizes, name, None) or getattr(config, usual_name))


def _shared_pooler(backbone: PreTrainedModel, hidden_size: int) -> Pooler:
    """The pooler of all exits, with the pretrained weights if the backbone has such a pooler."""
    pooler = Pooler(hidden_size)
    own = getattr(backbone, "pooler", None)
    pretrained = getattr(own, "dense", own)  # ALBERT's is the linear layer itself
    if isinstance(pretrained, nn.Linear):
        pooler.dense.load_state_dict(pretrained.state_dict())
    return pooler
