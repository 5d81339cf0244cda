"""The parts of an export that only decoders have: segments with a cache, cache fills and heads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import click
import torch
from tokenizers import Tokenizer
from torch import nn

from offramp.export.chat import ChatFacts, read_chat
from offramp.export.segments import (
    TOLERANCE,
    ManifestFacts,
    SameAnswers,
    Sample,
    Segment,
    SplitNetwork,
    Values,
    describe_tensors,
    require_float32,
    same_label,
)
from offramp.models.decoder import (
    DecoderNetwork,
    KeyValue,
    cap,
    hidden_states,
    project_cache,
    run_block,
)
from offramp.models.families import decoder_family_of
from offramp.models.families.family import Context
from offramp.models.macs import linear_weights
from offramp.models.network import parse_exits
from offramp.runtime.bundle.fields import LONGEST_INPUT
from offramp.runtime.bundle.manifest import (
    EXIT_HIDDEN,
    GATE,
    GENERATION,
    NEXT,
    Macs,
    RuleSpec,
    Tensor,
    TextInput,
)
from offramp.runtime.inputs.tokenizer_checks import LARGEST_FILE, check_tokenizer, tokenizer_reason
from offramp.training.checkpoint import TOKENIZER, TRAINING, load_exits, read_json

STEM_INPUTS = (
    Tensor("input_ids", "int64", ("batch", "seq")),
    Tensor("position_ids", "int64", ("batch", "seq")),
    Tensor("past_valid", "int64", ("batch", "past")),
)
# Ids of a byte-pair vocabulary are ordered by how early a pair was given an id: the first are the frequent
# ones. A third of SmolLM2's ids covers 92 % of the tokens of film reviews, in a third of the time.
DRAFT_IDS = 16384
# For verification: tokens of a prompt and of two steps; places of the cache beyond these; the value in unused
# places, which changes the outputs if the mask is wrong.
CHUNKS, SPARE, UNUSED = (8, 1, 1), 3, 9.0


class DecoderStem(nn.Module):
    """The graph before the first segment: from token ids and positions to the hidden state.

    Inputs: STEM_INPUTS; past_valid marks the places of the cache that hold a token. Outputs: hidden [batch,
    seq, hidden size] and the tensors that every block reads.
    """

    def __init__(self, network: DecoderNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the stem; tensors: in the order of STEM_INPUTS."""
        hidden, context = self.network.stem(*tensors)
        return hidden, *context.values()


class CachedBlock(nn.Module):
    """A block with its attention to the cache, as one module, since the exporter names nodes by modules."""

    def __init__(self, network: DecoderNetwork, block: int) -> None:
        super().__init__()
        self.family, self.block = network.family, network.blocks[block]
        self.form = network.attention(self.block)

    def forward(
        self, hidden: torch.Tensor, context: Context, past: KeyValue
    ) -> tuple[torch.Tensor, KeyValue]:
        """Run the block on new tokens; returns hidden, and the new keys and values."""
        return run_block(self.family, self.form, self.block, hidden, context, past)


class DecoderSegment(nn.Module):
    """Consecutive blocks of a decoder, which read a cache of keys and values, and the exit after them.

    Inputs: hidden, the stem's other outputs, and keys and values of each block's past. Outputs: hidden, the
    new keys and values of each block and, where the network has an exit, exit_hidden and gate.
    """

    def __init__(self, network: DecoderNetwork, blocks: range, reads: Sequence[str]) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.blocks = nn.ModuleList(CachedBlock(network, block) for block in blocks)
        self.norm = network.family.norm(network.model)
        name = str(blocks.stop)
        early = blocks.stop < network.block_count
        self.exit = network.exits[name] if early and name in network.exits else None
        self.policy = network.policies[name] if early and name in network.policies else None

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the segment; tensors: hidden, the stem's outputs named in `reads`, keys and values by block."""
        hidden, *others = tensors
        context = dict(zip(self.reads, others, strict=False))
        past, outputs = others[len(self.reads) :], list[torch.Tensor]()
        for number, block in enumerate(self.blocks):
            pair = past[2 * number], past[2 * number + 1]
            hidden, new = block(hidden, context, pair)
            outputs += new
        if self.exit is not None:
            outputs.append(hidden + self.exit(self.norm(hidden)))
        if self.policy is not None:
            outputs.append(self.policy(self.norm(hidden))[..., 0].sigmoid())  # [batch, seq]
        return hidden, *outputs


class BlockCacheFill(nn.Module):
    """Computes the keys and values that tokens leave in the cache of a block that they skip."""

    def __init__(self, network: DecoderNetwork, block: int) -> None:
        super().__init__()
        self.family, self.block = network.family, network.blocks[block]
        self.form = network.attention(self.block)

    def forward(self, hidden: torch.Tensor, context: Context) -> KeyValue:
        """Compute keys [batch, kv heads, size, tokens] and values [batch, kv heads, tokens, size]."""
        keys, values = project_cache(self.family, self.form, self.block, hidden, context)
        return keys.transpose(2, 3), values


class CacheFill(nn.Module):
    """Computes keys and values for the caches of consecutive blocks that tokens skip.

    Inputs: hidden of these tokens, and the tensors that rotate keys. Outputs: keys and values of each block.
    """

    def __init__(self, network: DecoderNetwork, blocks: range, reads: Sequence[str]) -> None:
        super().__init__()
        self.reads = tuple(reads)
        self.blocks = nn.ModuleList(BlockCacheFill(network, block) for block in blocks)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute keys and values by block; tensors: hidden, then those named in `reads`."""
        hidden, *others = tensors
        context = dict(zip(self.reads, others, strict=True))
        return tuple(new for block in self.blocks for new in block(hidden, context))


class DecoderHead(nn.Module):
    """Final norm and vocabulary projection: from hidden after the last block, or exit_hidden, to logits.

    ids: the logits cover this many first ids of the vocabulary (None: all).
    """

    def __init__(self, network: DecoderNetwork, ids: int | None = None) -> None:
        super().__init__()
        self.norm, self.softcap = network.family.norm(network.model), network.softcap
        self.words: nn.Linear = network.model.lm_head
        if ids is not None:
            self.words = nn.Linear(network.hidden_size, ids, network.model.lm_head.bias is not None)
            with torch.no_grad():
                whole = network.model.lm_head.parameters()
                for first, all_ids in zip(self.words.parameters(), whole, strict=True):
                    first.copy_(all_ids[:ids])

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute logits [batch, seq, ids]; tensors: hidden [batch, seq, hidden size] alone."""
        return (cap(self.words(self.norm(tensors[0])), self.softcap),)


def split_decoder(
    network: DecoderNetwork, cuts: str | Sequence[int], draft_ids: int = DRAFT_IDS
) -> SplitNetwork:
    """Cut a decoder into stem, segments, cache fills and heads.

    cuts: blocks after which segments end, see parse_exits. draft_ids: number of ids of the head that drafts;
    there is no such head if the vocabulary is not twice as large. Raises
    ValueError for a cut that is impossible, for cuts without an exit where the network has exits, and for
    weights that are not float32.
    """
    require_float32(network)
    network.eval()
    ends = parse_exits(cuts, network.block_count)
    if network.exits and (bare := [end for end in ends[:-1] if str(end) not in network.exits]):
        known = ", ".join(sorted(network.exits, key=int))
        raise ValueError(f"a segment may not end after block {bare[0]}: there are exits after {known}")
    stem_outputs, cache_sizes = _probe(network)
    longest, size = network.longest, network.hidden_size
    stem = Segment("stem", DecoderStem(network).eval(), STEM_INPUTS, stem_outputs, (), Macs(), longest)
    hidden, *context = stem_outputs
    reads = [tensor.name for tensor in context]
    rotations = tuple(tensor for tensor in context if not tensor.name.startswith("mask"))
    segments, cache_fills = list[Segment](), list[Segment]()
    for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        blocks, numbers = range(start, end), tuple(range(start + 1, end + 1))
        module = DecoderSegment(network, blocks, reads).eval()
        past = _cache_tensors(cache_sizes, numbers, "past", "past")
        new = _cache_tensors(cache_sizes, numbers, "new", "seq")
        outputs = [Tensor(NEXT + "hidden", "float32", hidden.shape), *new]
        weights = sum(linear_weights(network.blocks[block]) for block in blocks)
        if module.exit is not None:
            outputs.append(Tensor(EXIT_HIDDEN, "float32", hidden.shape))
            weights += size * size
        if module.policy is not None:
            outputs.append(Tensor(GATE, "float32", hidden.shape[:2]))
        macs, name = Macs(token=weights, pair=2 * size * len(blocks)), f"segment_{number:02}"
        inputs = (*stem_outputs, *past)
        segments.append(Segment(name, module, inputs, tuple(outputs), numbers, macs, longest))
        if number:
            fill = CacheFill(network, blocks, [tensor.name for tensor in rotations]).eval()
            macs = Macs(token=2 * size * cache_sizes[0] * cache_sizes[1] * len(blocks))
            name, inputs = f"fill_{number:02}", (hidden, *rotations)
            cache_fills.append(Segment(name, fill, inputs, new, numbers, macs, longest))
    draft = None if 2 * draft_ids > network.vocab_size else _head("draft", network, hidden, draft_ids)
    return SplitNetwork(
        stem, tuple(segments), tuple(cache_fills), _head("head", network, hidden, None), draft
    )


def _head(name: str, network: DecoderNetwork, hidden: Tensor, ids: int | None) -> Segment:
    count = network.vocab_size if ids is None else ids
    logits = Tensor("logits", "float32", ("batch", "seq", count))
    module, macs = DecoderHead(network, ids).eval(), Macs(token=network.hidden_size * count)
    return Segment(name, module, (hidden,), (logits,), (), macs, network.longest)


def _cache_tensors(
    sizes: tuple[int, int], blocks: Sequence[int], prefix: str, axis: str
) -> tuple[Tensor, ...]:
    """Describe keys [batch, kv heads, size, tokens] and values [batch, kv heads, tokens, size] of blocks."""
    heads, size = sizes
    shapes: dict[str, tuple[int | str, ...]] = {
        "k": ("batch", heads, size, axis),
        "v": ("batch", heads, axis, size),
    }
    return tuple(
        Tensor(f"{prefix}_{kind}_{block}", "float32", shape)
        for block in blocks
        for kind, shape in shapes.items()
    )


@torch.no_grad()
def _probe(network: DecoderNetwork) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """Find the stem's outputs by running it at two sizes, and the number of heads and size of keys."""
    small, large = (2, 5, 11), (3, 7, 13)
    outputs = list[Context]()
    for rows, tokens, places in (small, large):
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        positions = torch.arange(tokens).expand(rows, -1)
        hidden, context = network.stem(ids, positions, torch.ones(rows, places, dtype=torch.int64))
        outputs.append({"hidden": hidden, **context})
    keys, _ = network.cache_fill(0, hidden, context)
    axes = dict(zip(zip(small, large, strict=True), ("batch", "seq", "past"), strict=True))
    return describe_tensors(outputs[0], outputs[1], axes), (keys.shape[1], keys.shape[3])


@dataclass(frozen=True)
class ExportableDecoder:
    """A causal language model with everything that its bundle needs; see segments.Exportable.

    folder: holds its tokenizer.json. training: the contents of training.json. draft_ids: see split_decoder.
    chat: its chat templates and special tokens.
    """

    network: DecoderNetwork
    folder: Path
    training: Mapping[str, Any] = field(default_factory=dict)
    draft_ids: int = DRAFT_IDS
    chat: ChatFacts = field(default_factory=ChatFacts)

    # int8 and int4: activations are quantized token by token, so that a token gets the same logits among
    # others as alone; one scale for all of them would not allow that.
    weights_only: ClassVar[bool] = True
    # In variants other than fp32 a wrong graph differs by more than this. SmolLM2-135M, right graphs: 0.08 in
    # int8, 0.7 in int4.
    tolerances: ClassVar[Mapping[str, float]] = {"fp32": TOLERANCE, "fp16": 0.1, "int8": 0.2, "int4": 1.5}

    @property
    def same_answers(self) -> SameAnswers:
        """Compare the most probable tokens of two precisions; see segments.Exportable."""
        return same_label

    @property
    def files(self) -> dict[str, Path | bytes]:
        """The tokenizer file and the contents of the chat templates, by their names in the bundle."""
        return {TOKENIZER: self.folder / TOKENIZER, **self.chat.files}

    def split(self, cuts: str | Sequence[int], variants: Sequence[str] | None = None) -> SplitNetwork:
        """Cut the network after these blocks; see split_decoder."""
        return split_decoder(self.network, cuts, self.draft_ids)

    def facts(self, split: SplitNetwork, variants: Sequence[str]) -> ManifestFacts:
        """The facts that the manifest of the split holds in addition to its segments."""
        network, config = self.network, self.network.model.generation_config
        pad_id = config.pad_token_id
        special = {"special_tokens": dict(self.chat.special_tokens)} if self.chat.special_tokens else {}
        return ManifestFacts(
            task=GENERATION,
            labels=(),
            input=TextInput(
                TOKENIZER,
                "",
                pad_id if _is_id(pad_id, network.vocab_size) else 0,  # -1 and others mean none, too
                min(network.longest, LONGEST_INPUT),
            ),
            rule=_default_rule(split, str(self.training.get("recipe", ""))),
            points=(),
            costs={},
            training=self.training,
            provenance={"backbone": network.model.config.model_type, **special},
            stop_ids=stop_ids(network),
        )

    def samples(
        self, split: SplitNetwork, variants: Sequence[str], texts: Sequence[str] | None
    ) -> Iterator[Sample]:
        """Samples to verify the split on: a prompt of random ids and two steps of one token.

        The past of each is the network's own keys and values.
        """
        network, total = self.network, sum(CHUNKS)
        ids = torch.randint(0, network.vocab_size, (1, total), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(total)[None]
        embedded = network.family.embed(network.model, ids, positions)
        states = [embedded, *hidden_states(network, ids)]  # by number of blocks that ran
        logits = network.model(input_ids=ids, use_cache=False).logits  # by transformers itself
        cache = _cache(network, states, positions)
        start = 0
        for count in CHUNKS:
            here = slice(start, start + count)
            valid = torch.zeros(1, total + SPARE, dtype=torch.int64)
            valid[:, :start] = 1
            past: Values = {}
            for name, new in cache.items():
                axis = 3 if "_k_" in name else 2
                shape = list(new.shape)
                shape[axis] = total + SPARE
                past[name.replace("new", "past")] = torch.full(shape, UNUSED)
                past[name.replace("new", "past")].narrow(axis, 0, start).copy_(new.narrow(axis, 0, start))
            stem_inputs = {"input_ids": ids[:, here], "position_ids": positions[:, here], "past_valid": valid}
            new_here = {n: t.narrow(3 if "_k_" in n else 2, start, count) for n, t in cache.items()}
            states_here = [state[:, here] for state in states]
            expected = _expected(network, split, stem_inputs, states_here, new_here, logits[:, here])
            yield Sample(stem_inputs | past, torch.ones(1, count, dtype=torch.bool), expected)
            start += count


def open_decoder(folder: Path) -> ExportableDecoder:
    """Load a causal language model from a folder of transformers, with the exits that ee-train added.

    Notes on its tokenizer are written on stderr. Raises ValueError, or what transformers raises, for a folder
    without such a model, with weights that are not all of one such model, or without a tokenizer.json that
    ee-run reads; UnsupportedFamily; BadCheckpoint.
    """
    from transformers import AutoModelForCausalLM

    from offramp.training.pretrained import load_pretrained_config, load_weights, require_causal_lm

    if not (folder / TOKENIZER).is_file():
        raise ValueError(f"it has no {TOKENIZER}: save it with a fast tokenizer of transformers")
    config = load_pretrained_config(folder)
    decoder_family_of(config.model_type)  # before weights are read
    require_causal_lm(config)
    tokenizer = _read_tokenizer(folder / TOKENIZER, int(config.vocab_size))
    chat = read_chat(folder, tokenizer)
    for note in chat.notes:
        click.echo(f"{folder}: {note}", err=True)
    try:
        model = load_weights(AutoModelForCausalLM, folder)
    except (OSError, ValueError):
        raise
    except Exception as problem:  # files that do not fit make transformers raise nearly anything
        raise ValueError(f"its weights cannot be loaded: {type(problem).__name__}: {problem}") from problem
    network = DecoderNetwork(model)
    load_exits(network, folder)
    training = read_json(folder / TRAINING) if (folder / TRAINING).is_file() else {}
    return ExportableDecoder(network.float(), folder, training, chat=chat)


def stop_ids(network: DecoderNetwork) -> tuple[int, ...]:
    """The tokens at which transformers.generate ends an answer, those that the vocabulary has.

    They are those of generation_config.json, and of config.json for a folder without that file.
    """
    ends = network.model.generation_config.eos_token_id
    ids = ends if isinstance(ends, (list, tuple)) else [ends]
    return tuple(dict.fromkeys(id for id in ids if _is_id(id, network.vocab_size)))


def _is_id(value: object, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _read_tokenizer(file: Path, vocab_size: int) -> Tokenizer:
    """Open a tokenizer.json that ee-run can read, too; raises ValueError for others."""
    try:
        text = file.read_text("utf-8")
        if len(text.encode("utf-8")) > LARGEST_FILE:
            raise ValueError(f"more than {LARGEST_FILE} bytes")
        check_tokenizer(text, vocab_size)
        tokenizer: Tokenizer = Tokenizer.from_str(text)
    except BaseException as problem:  # a panic of the library is no Exception
        raise ValueError(
            f"{file.name}: no tokenizer that ee-run reads: {tokenizer_reason(problem)}"
        ) from problem
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _default_rule(split: SplitNetwork, recipe: str) -> RuleSpec:
    """The default rule of a bundle: the one for which the network was trained."""
    if len(split.segments) > 1:
        if any(tensor.name == GATE for tensor in split.segments[0].outputs):
            return RuleSpec("gate", {"threshold": 0.5})
        if recipe == "layerskip":
            return RuleSpec("speculative", {})
    return RuleSpec("never", {})


def _cache(network: DecoderNetwork, states: Sequence[torch.Tensor], positions: torch.Tensor) -> Values:
    """Keys and values of every block and token, by the names of a segment's outputs."""
    context = network.rotate_by(positions)
    cache: Values = {}
    for number, hidden in enumerate(states[: network.block_count], 1):
        keys, values = network.cache_fill(number - 1, hidden, context)
        cache[f"new_k_{number}"], cache[f"new_v_{number}"] = keys.transpose(2, 3), values
    return cache


def _expected(
    network: DecoderNetwork,
    split: SplitNetwork,
    stem_inputs: Values,
    states: Sequence[torch.Tensor],
    cache: Values,
    logits: torch.Tensor,
) -> Iterator[Values]:
    """Outputs of every segment for some tokens, computed by the network's own methods, but for logits.

    states: their hidden states [1, tokens, hidden] by number of blocks that ran. cache: their keys and
    values. logits [1, tokens, vocabulary]: of the model that transformers loaded, so that a difference
    between it and the family's adapter is found, too.
    """
    hidden, context = network.stem(*stem_inputs.values())
    yield {"hidden": hidden, **context}
    for segment in split.in_walking_order():
        if segment in split.heads:
            yield {"logits": logits[..., : int(segment.outputs[0].shape[-1])]}
        elif segment in split.cache_fills:
            outputs: Values = {}
            for block in segment.blocks:
                keys, values = network.cache_fill(block - 1, states[segment.blocks[0] - 1], context)
                outputs |= {f"new_k_{block}": keys.transpose(2, 3), f"new_v_{block}": values}
            yield outputs
        elif segment.blocks:
            end = segment.blocks[-1]
            outputs = {NEXT + "hidden": states[end]} | {
                f"new_{kind}_{block}": cache[f"new_{kind}_{block}"]
                for block in segment.blocks
                for kind in "kv"
            }
            names = {tensor.name for tensor in segment.outputs}
            if EXIT_HIDDEN in names:
                outputs[EXIT_HIDDEN] = network.exit_hidden(end, states[end])
            if GATE in names:
                outputs[GATE] = network.gate_logit(end, states[end]).sigmoid()
            yield outputs
