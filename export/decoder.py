"""Cut a decoder into the segments of its bundle, and say what else the bundle needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import click
import torch

from offramp.export.cached_attention import reason_against, rotation_facts
from offramp.export.chat import ChatFacts, read_chat
from offramp.export.decoder_modules import (
    IDS,
    POSITIONS,
    STEM_INPUTS,
    CacheFill,
    DecoderHead,
    DecoderSegment,
    DecoderStem,
    DraftBlock,
    EmbeddingStem,
)
from offramp.export.decoder_samples import decoder_samples
from offramp.export.model_folder import (
    generation_notes,
    read_tokenizer,
    refuse_short_cache,
    require_generation_config,
    require_text_model,
)
from offramp.export.segments import (
    TOLERANCE,
    ManifestFacts,
    SameAnswers,
    Sample,
    Segment,
    SplitNetwork,
    describe_tensors,
    require_float32,
    same_label,
)
from offramp.models.controllers import controllers_of
from offramp.models.decoder import DecoderNetwork
from offramp.models.draft_head import draft_head_of
from offramp.models.families import decoder_family_of
from offramp.models.families.family import Context
from offramp.models.macs import linear_weights
from offramp.models.network import parse_exits
from offramp.runtime.bundle.fields import LONGEST_INPUT
from offramp.runtime.bundle.manifest import (
    APPENDED,
    CONTROLLER,
    EXIT_HIDDEN,
    GATE,
    GENERATION,
    IN_PLACE,
    LAST_POSITIONS,
    NEXT,
    PREVIOUS_HIDDEN,
    TOTAL_LENGTH,
    Macs,
    RuleSpec,
    Tensor,
    TextInput,
    table_names,
)
from offramp.training.checkpoint import TOKENIZER, TRAINING, load_exits, read_json

# Ids of a byte-pair vocabulary are ordered by how early a pair was given an id: the first are the frequent
# ones. A third of SmolLM2's ids covers 92 % of the tokens of film reviews, in a third of the time.
DRAFT_IDS = 16384


class _Form(NamedTuple):
    """The stem, and what segments and cache fills read besides hidden and the past, in one form of cache.

    cache: APPENDED or IN_PLACE. cache_sizes: number of heads and size of keys.
    """

    cache: str
    stem: Segment
    cache_sizes: tuple[int, int]
    reads: tuple[Tensor, ...]
    fill_reads: tuple[Tensor, ...]

    def segment_reads(self, rotations: Sequence[str]) -> tuple[Tensor, ...]:
        """What a segment reads whose blocks have these rotations."""
        return self.reads if self.cache == APPENDED else _without_other_tables(self.reads, rotations)

    def reads_of_fill(self, rotations: Sequence[str]) -> tuple[Tensor, ...]:
        """What a cache fill reads whose blocks have these rotations."""
        if self.cache == APPENDED:
            return self.fill_reads
        return _without_other_tables(self.fill_reads, rotations) if rotations else ()


def split_decoder(
    network: DecoderNetwork, cuts: str | Sequence[int], draft_ids: int = DRAFT_IDS, *, portable: bool = False
) -> SplitNetwork:
    """Cut a decoder into stem, segments, cache fills and heads.

    cuts: blocks after which segments end, see parse_exits. draft_ids: number of ids of the head that drafts;
    there is no such head if the vocabulary is not twice as large. portable: graphs of ONNX's own operators,
    whose keys and values are appended to the cache. Otherwise they use ONNX Runtime's attention, which
    extends the cache in place, unless it cannot express the network's (see reason_against). Raises
    ValueError for weights that are not float32, for cuts without an exit in a network with exits, and for
    cuts that join controlled blocks.
    """
    require_float32(network)
    network.eval()
    ends = parse_exits(cuts, network.block_count)
    if network.exits and (bare := [end for end in ends[:-1] if str(end) not in network.exits]):
        known = ", ".join(sorted(network.exits, key=int))
        raise ValueError(f"a segment may not end after block {bare[0]}: there are exits after {known}")
    if controllers_of(network) is not None and 1 < len(ends) < network.block_count:
        raise ValueError("tokens skip single blocks, by controllers: cut after each block (--segments each)")
    in_place = not portable and reason_against(network) is None
    form = _in_place_form(network) if in_place else _appended_form(network)
    longest, size, hidden = network.longest, network.hidden_size, form.stem.outputs[0]
    segments, cache_fills = list[Segment](), list[Segment]()
    for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        blocks, numbers = range(start, end), tuple(range(start + 1, end + 1))
        rotations = _rotations_of(network, blocks)
        reads = form.segment_reads(rotations)
        module = DecoderSegment(network, blocks, [tensor.name for tensor in reads], in_place).eval()
        past, grown, new = _cache_tensors(form, numbers)
        outputs = [Tensor(NEXT + "hidden", "float32", hidden.shape), *grown]
        weights = sum(linear_weights(network.blocks[block]) for block in blocks)
        if module.exit is not None:
            outputs.append(Tensor(EXIT_HIDDEN, "float32", hidden.shape))
            weights += size * size
        if module.policy is not None:
            outputs.append(Tensor(GATE, "float32", hidden.shape[:2]))
        if module.controllers is not None:
            ahead = module.controllers.margin.out_features
            outputs.append(Tensor(CONTROLLER, "float32", (*hidden.shape[:2], ahead)))
            weights += size * ahead
        macs, name = Macs(token=weights, pair=2 * size * len(blocks)), f"segment_{number:02}"
        inputs = (hidden, *reads, *past)
        segments.append(
            Segment(name, module, inputs, tuple(outputs), numbers, macs, longest, vendor_operators=in_place)
        )
        if number:
            reads = form.reads_of_fill(rotations)
            names = [tensor.name for tensor in reads]
            fill = CacheFill(network, blocks, names, rotations if in_place else None).eval()
            macs = Macs(token=2 * size * form.cache_sizes[0] * form.cache_sizes[1] * len(blocks))
            name, inputs = f"fill_{number:02}", (hidden, *reads)
            cache_fills.append(Segment(name, fill, inputs, new, numbers, macs, longest))
    draft = None if 2 * draft_ids > network.vocab_size else _head("draft", network, hidden, draft_ids)
    return SplitNetwork(
        form.stem,
        tuple(segments),
        tuple(cache_fills),
        _head("head", network, hidden, None),
        draft,
        cache=form.cache,
        rotations=rotation_facts(network) if in_place else {},
        windows=tuple(network.windows) if in_place else (),
        draft_block=_draft_block(network, form),
    )


def _draft_block(network: DecoderNetwork, form: _Form) -> Segment | None:
    """The graph of the block of a draft head; None if the network has no draft head."""
    draft_head = draft_head_of(network)
    if draft_head is None:
        return None
    rotation, in_place = network.attention(draft_head.block).rotation, form.cache == IN_PLACE
    reads = form.segment_reads([rotation] if rotation else [])
    number = network.block_count + 1
    past, grown, _ = _cache_tensors(form, (number,))
    hidden = form.stem.outputs[0]
    inputs = (hidden, replace(hidden, name=PREVIOUS_HIDDEN), *reads, *past)
    outputs = (replace(hidden, name=EXIT_HIDDEN), *grown)
    module = DraftBlock(network, [tensor.name for tensor in reads], in_place).eval()
    macs = Macs(token=linear_weights(draft_head), pair=2 * network.hidden_size)
    return Segment(
        "draft_block", module, inputs, outputs, (number,), macs, network.longest, vendor_operators=in_place
    )


def _head(name: str, network: DecoderNetwork, hidden: Tensor, ids: int | None) -> Segment:
    count = network.vocab_size if ids is None else ids
    logits = Tensor("logits", "float32", ("batch", "seq", count))
    module, macs = DecoderHead(network, ids).eval(), Macs(token=network.hidden_size * count)
    return Segment(name, module, (hidden,), (logits,), (), macs, network.longest)


def _cache_tensors(form: _Form, blocks: Sequence[int]) -> tuple[tuple[Tensor, ...], ...]:
    """Describe keys and values of blocks: the past, what a segment puts out, and those of new tokens."""
    if form.cache == APPENDED:
        new = _keys_and_values(form, blocks, "new", "seq")
        return _keys_and_values(form, blocks, "past", "past"), new, new
    past, grown = (_keys_and_values(form, blocks, prefix, "places") for prefix in ("past", "new"))
    return past, grown, _keys_and_values(form, blocks, "new", "seq")


def _keys_and_values(form: _Form, blocks: Sequence[int], prefix: str, axis: str) -> tuple[Tensor, ...]:
    """Values are [batch, kv heads, tokens, size], and so are keys; appended keys end with size, tokens."""
    heads, size = form.cache_sizes
    values: tuple[int | str, ...] = ("batch", heads, axis, size)
    keys = ("batch", heads, size, axis) if form.cache == APPENDED else values
    return tuple(
        Tensor(f"{prefix}_{kind}_{block}", "float32", shape)
        for block in blocks
        for kind, shape in (("k", keys), ("v", values))
    )


def _rotations_of(network: DecoderNetwork, blocks: range) -> list[str]:
    """Names of the rotations of some blocks (0-based), each once."""
    forms = [network.attention(network.blocks[block]) for block in blocks]
    return list(dict.fromkeys(form.rotation for form in forms if form.rotation))


def _without_other_tables(tensors: Sequence[Tensor], rotations: Sequence[str]) -> tuple[Tensor, ...]:
    """Tensors without the tables of rotations that are not among these."""
    own = {name for rotation in rotations for name in table_names(rotation)}
    return tuple(tensor for tensor in tensors if "places" not in tensor.shape or tensor.name in own)


@torch.no_grad()
def _in_place_form(network: DecoderNetwork) -> _Form:
    attention = network.whole_attention(network.blocks[0])
    hidden = Tensor("hidden", "float32", ("batch", "seq", network.hidden_size))
    inputs = (IDS, POSITIONS) if _embeds_positions(network) else (IDS,)
    module, longest = EmbeddingStem(network).eval(), network.longest
    stem = Segment("stem", module, inputs, (hidden,), (), Macs(), longest, vendor_operators=True)
    tables = tuple(
        Tensor(table, "float32", ("places", len(facts.frequencies)))
        for name, facts in rotation_facts(network).items()
        for table in table_names(name)
    )
    sizes = attention.kv_heads, attention.size
    return _Form(IN_PLACE, stem, sizes, (LAST_POSITIONS, TOTAL_LENGTH, *tables), (POSITIONS, *tables))


def _embeds_positions(network: DecoderNetwork) -> bool:
    """Whether the hidden state before the first block depends on the position."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    first, second = network.family.embed(network.model, ids, torch.arange(2)[None])[0]
    return not torch.equal(first, second)


@torch.no_grad()
def _appended_form(network: DecoderNetwork) -> _Form:
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
    tensors = describe_tensors(outputs[0], outputs[1], axes)
    stem = Segment("stem", DecoderStem(network).eval(), STEM_INPUTS, tensors, (), Macs(), network.longest)
    rotations = tuple(tensor for tensor in tensors[1:] if not tensor.name.startswith("mask"))
    return _Form(APPENDED, stem, (keys.shape[1], keys.shape[3]), tensors[1:], rotations)


@dataclass(frozen=True)
class ExportableDecoder:
    """A causal language model with everything that its bundle needs; see segments.Exportable.

    folder: holds its tokenizer.json. training: the contents of training.json. draft_ids, portable: see
    split_decoder. chat: its chat templates and special tokens. tokenizer: contents of the bundle's
    tokenizer.json; if empty, it is the folder's file.
    """

    network: DecoderNetwork
    folder: Path
    training: Mapping[str, Any] = field(default_factory=dict)
    draft_ids: int = DRAFT_IDS
    chat: ChatFacts = field(default_factory=ChatFacts)
    portable: bool = False
    tokenizer: bytes = b""

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
        return {TOKENIZER: self.tokenizer or self.folder / TOKENIZER, **self.chat.files}

    def split(self, cuts: str | Sequence[int], variants: Sequence[str] | None = None) -> SplitNetwork:
        """Cut the network after these blocks; see split_decoder."""
        return split_decoder(self.network, cuts, self.draft_ids, portable=self.portable)

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
        """Samples to verify the split on; see decoder_samples."""
        return decoder_samples(self.network, split)


def open_decoder(folder: Path, *, portable: bool = False) -> ExportableDecoder:
    """Load a causal language model from a folder of transformers, with the exits that ee-train added.

    portable: see split_decoder. Notes on its tokenizer, on settings of generation_config.json that change
    answers, and on attention that portable graphs alone can express, are written on stderr. Raises
    ValueError, or what transformers raises, for a folder without such a model, with weights that are not all
    of one such model, or without a tokenizer.json that ee-run reads; UnsupportedFamily; BadCheckpoint.
    """
    from transformers import AutoModelForCausalLM

    from offramp.training.pretrained import load_pretrained_config, load_weights, require_causal_lm

    if not (folder / TOKENIZER).is_file():
        raise ValueError(f"it has no {TOKENIZER}: save it with a fast tokenizer of transformers")
    require_text_model(folder)
    config = load_pretrained_config(folder)
    family = decoder_family_of(config.model_type)
    family.longest(config)  # refuses what no adapter can express, before weights are read
    require_causal_lm(config)
    require_generation_config(folder)
    tokenizer = read_tokenizer(folder / TOKENIZER, int(config.vocab_size))
    chat = read_chat(folder, tokenizer.tokenizer, tokenizer.left_out)
    try:
        model = load_weights(AutoModelForCausalLM, folder)
    except (OSError, ValueError):
        raise
    except Exception as problem:  # files that do not fit make transformers raise nearly anything
        raise ValueError(f"its weights cannot be loaded: {type(problem).__name__}: {problem}") from problem
    network = DecoderNetwork(model)
    refuse_short_cache(network)
    load_exits(network, folder)
    for note in (*tokenizer.notes, *chat.notes, *generation_notes(folder, model.generation_config)):
        click.echo(f"{folder}: {note}", err=True)
    training = read_json(folder / TRAINING) if (folder / TRAINING).is_file() else {}
    if not portable and (reason := reason_against(network)) is not None:
        click.echo(f"{folder}: {reason}, so its graphs are written as with --portable", err=True)
        portable = True
    return ExportableDecoder(
        network.float(),
        folder,
        training,
        chat=chat,
        portable=portable,
        tokenizer=tokenizer.content if tokenizer.left_out else b"",
    )


def stop_ids(network: DecoderNetwork) -> tuple[int, ...]:
    """The tokens at which transformers.generate ends an answer, those that the vocabulary has.

    They are those of generation_config.json, and of config.json for a folder without that file.
    """
    ends = network.model.generation_config.eos_token_id
    ids = ends if isinstance(ends, (list, tuple)) else [ends]
    return tuple(dict.fromkeys(id for id in ids if _is_id(id, network.vocab_size)))


def _is_id(value: object, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _default_rule(split: SplitNetwork, recipe: str) -> RuleSpec:
    """The default rule of a bundle: the one for which the network was trained."""
    if len(split.segments) > 1:
        names = {tensor.name for tensor in split.segments[0].outputs}
        if CONTROLLER in names:
            return RuleSpec("select", {"threshold": 0.5})
        if GATE in names:
            return RuleSpec("gate", {"threshold": 0.5})
        if recipe == "layerskip":
            return RuleSpec("speculative", {})
    if split.draft_block is not None:
        return RuleSpec("speculative", {})
    return RuleSpec("never", {})
