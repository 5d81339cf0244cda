"""The manifest: the one typed description of a bundle (format 1).

The reader owns it and the writer (export) imports it. Everything in it is a fact about the artefact; options
of the caller (engine, threads, thresholds) are keyword arguments elsewhere and are never stored here.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

FORMAT = 1
FILE_NAME = "manifest.json"
GENERATION = "text-generation"
TASKS = ("text-classification", "image-classification", GENERATION)
CHANNELS = ("RGB", "BGR")
RESAMPLING = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # Pillow's names
DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")  # numpy's names
# A graph cannot give a new value under the name of its own input: what a segment makes anew of its input
# "hidden" comes out as "next_hidden", and is what the segment after it reads as "hidden".
NEXT = "next_"
SIGNALS = ("logits", "gate", "forecast")
# A decoder's segment reads what its block 3 attended to before as "past_k_3" and "past_v_3", and puts out
# what it adds to them as "new_k_3" and "new_v_3".
PAST, NEW = ("past_k_", "past_v_"), ("new_k_", "new_v_")
# Where a token may exit: P(exit) of its policy, and what the head reads there where that is not hidden
# itself.
GATE, EXIT_HIDDEN = "gate", "exit_hidden"
AXES = ("batch", "seq", "past")  # the only symbolic sizes; a tensor whose first is "batch" follows its row


@dataclass(frozen=True)
class Tensor:
    """One named input or output of a graph: dtype by numpy's name, shape of numbers and "batch" / "seq"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def per_row(self) -> bool:
        """True when the first axis is the batch: gathered when rows leave; others all rows share."""
        return bool(self.shape) and self.shape[0] == "batch"


@dataclass(frozen=True)
class Variant:
    """One precision of a stage: its graph file and what goes in and comes out.

    The stem puts out tensors under the names that segments read (hidden, mask, pool, evidence ...). A segment
    puts out logits, gate where it has a policy, forecast where it has one (see rules.Signals), and for those
    of its inputs that it makes anew (hidden, evidence) `next_<name>`; the last one only logits.
    """

    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates for one row of n tokens: token * n + pair * n * n + row."""

    token: int = 0
    pair: int = 0
    row: int = 0

    def of(self, tokens: float) -> float:
        """Multiply-accumulates for one row of `tokens` tokens."""
        return self.token * tokens + self.pair * tokens * tokens + self.row


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks (1-based) exported as one graph a variant, with the exit that follows them.

    The stem, a head and a draft head have the same form, without blocks.
    """

    name: str
    blocks: tuple[int, ...]
    macs: Macs
    variants: dict[str, Variant]

    @property
    def first_graph(self) -> Variant:
        """The graph of the default variant; inputs and outputs are the same in every variant."""
        return next(iter(self.variants.values()))


@dataclass(frozen=True)
class TextInput:
    """How text becomes ids: tokenizer file, what goes before the (first) text, padding id, most tokens."""

    tokenizer: str
    prefix: str
    pad_id: int
    longest: int


@dataclass(frozen=True)
class ImageInput:
    """How an image becomes pixel_values [batch, 3, height, width], in this order.

    resize: (n,) the shorter side to n pixels, keeping the shape; (height, width) exactly; () not at all.
    resample: Pillow's name of the filter. Then the centre of height, width is cut out. scale: what the values
    0..255 are multiplied by; then minus mean and divided by std, one each for the channels in the order of
    `channels`.
    """

    height: int
    width: int
    resize: tuple[int, ...]
    resample: str
    channels: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class RuleSpec:
    """A rule by name with its parameters; offramp.runtime.rules.bind turns it into a function."""

    name: str
    parameters: dict[str, float]


@dataclass(frozen=True)
class StepCosts:
    """What running each segment costs in one unit, for a row of `tokens` tokens.

    steps: variant -> one number a segment, exit, policy and forecast included; the stem is not.
    """

    tokens: int
    steps: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class OperatingPoint:
    """A named setting of a rule with the accuracy and cost measured for it on a split of a data set."""

    name: str
    rule: RuleSpec
    variant: str
    data: str
    split: str
    measured: dict[str, float]


@dataclass(frozen=True)
class FileFact:
    """What a file of the bundle must be: sha256 in lower-case hex, size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class DecoderFacts:
    """What only a decoder has.

    head: the graph that makes logits from the hidden state after any segment. stop: ids that end an answer.
    cache_fills: one graph a segment, in the order of their blocks, that makes the keys and values of tokens
    which exited before it from their hidden state; every segment but the first has one, or none has. draft: a
    head with fewer ids, the first of the vocabulary, for draft tokens that are verified later.
    """

    head: Segment
    stop: tuple[int, ...]
    cache_fills: tuple[Segment, ...] = ()
    draft: Segment | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything that the runtime knows about a bundle.

    segments: in walking order; all offer the same variants, the first of which is the default ("fp32").
    input: told apart by their fields. vocab_size: 0 where there is no text.
    labels: none of decoders. decoder: what decoders alone have; left out of the file elsewhere.
    rule: what decides when the caller wishes nothing. files: every file of the bundle but the manifest
    itself. costs: by unit ("bops": bit operations, "ms": milliseconds of one row, measured on an engine), for
    rules that choose between variants; left out of the file where there are none.
    """

    format: int
    task: str
    labels: tuple[str, ...]
    input: TextInput | ImageInput
    hidden_size: int
    vocab_size: int
    blocks: int
    stem: Segment
    segments: tuple[Segment, ...]
    rule: RuleSpec
    points: tuple[OperatingPoint, ...]
    files: dict[str, FileFact]
    provenance: dict[str, Any]
    costs: dict[str, StepCosts] = field(default_factory=dict)
    decoder: DecoderFacts | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants that every segment offers, the default first; a plan's numbers index this."""
        return tuple(self.segments[0].variants)

    def to_json(self) -> str:
        """Write it: in the order of this class, indented by one, a newline at the end. ValueError on NaN."""
        facts = dataclasses.asdict(self)
        for name in ("costs", "decoder"):
            if not facts[name]:  # so that files without them read as they always did
                del facts[name]
        return json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
