"""The manifest: the typed description of a bundle (format 1).

The package that writes bundles (export) imports it. Everything in it is a fact about the bundle; options
of the caller (engine, threads, thresholds) are keyword arguments elsewhere and are never stored here.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = 1
FILE_NAME = "manifest.json"
SIGNATURE_NAME = "manifest.json.sig"  # beside it if the bundle is signed (bundle.signature)
# Kinds of task (Manifest.kind): classification of texts and that of images are one kind, all others are named
# as their task.
CLASSIFICATION = "classification"
GENERATION = "text-generation"
MULTI_LABEL, TOKENS = "multi-label-classification", "token-classification"
REGRESSION, EMBEDDING = "regression", "sentence-embedding"
CHANNELS = ("RGB", "BGR")
RESAMPLING = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # Pillow's names
DTYPES = ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")  # numpy's names
# A graph cannot have an output with the name of its own input: the new value of a segment's input "hidden" is
# its output "next_hidden", which the segment after it reads as "hidden".
NEXT = "next_"
SIGNALS = ("logits", "gate", "forecast", "answer")
# A decoder's segment reads the cached keys and values of its block 3 as "past_k_3" and "past_v_3", and
# outputs those of the new tokens as "new_k_3" and "new_v_3".
PAST, NEW = ("past_k_", "past_v_"), ("new_k_", "new_v_")
# Outputs of a segment after which a token may exit: P(exit) of its policy, and the head's input if that is
# not hidden itself.
GATE, EXIT_HIDDEN = "gate", "exit_hidden"
# What a draft block reads of each token beside the stem's output: the hidden state after the last segment of
# the token before it, zeros before the first.
PREVIOUS_HIDDEN = "previous_hidden"
# Output of a segment of a decoder with controllers: P(run) of the segments ahead, but for the last one, which
# always runs.
CONTROLLER = "controller"
GROUPS = ("all", "class", "exit")  # of rows for which a guarantee's limit holds (Guarantee.groups)
# The only symbolic sizes; a tensor whose first is "batch" follows its row.
AXES = ("batch", "seq", "past", "places")
# How a decoder's cache grows. Appended: a segment puts out keys and values of the new tokens alone, which
# belong behind its past. In place: it reads keys and values of all places and puts them out with the new ones
# among them; both may be one memory.
APPENDED, IN_PLACE = "appended", "in_place"


@dataclass(frozen=True)
class Tensor:
    """One named input or output of a graph.

    dtype: numpy's name. shape: numbers, and names of AXES for sizes that vary.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def per_row(self) -> bool:
        """Whether the first axis is the batch; all rows share the tensors for which it is not."""
        return bool(self.shape) and self.shape[0] == "batch"


# What the segments of a decoder read whose cache grows in place: the position of the last token of each row,
# and one more than the largest of them.
LAST_POSITIONS = Tensor("last_positions", "int32", ("batch",))
TOTAL_LENGTH = Tensor("total_length", "int32", ())


def table_names(rotation: str) -> tuple[str, str]:
    """Names of the tables of cosines and sines of a rotation, which such segments read."""
    return f"{rotation}_cosine_table", f"{rotation}_sine_table"


@dataclass(frozen=True)
class Variant:
    """One precision of a segment: the file of its graph, and the graph's inputs and outputs.

    The stem's outputs have the names that segments read (hidden, mask, pool, evidence ...). A segment outputs
    logits and answer as its task has them (see Task), gate if it has a policy, forecast if it has an error
    forecast (see rules.Signals), and `next_<name>` for those of its inputs that it updates (hidden,
    evidence); the last segment outputs only logits and answer.

    before: graphs that run first, one after another, each on the newest values of what it reads: blocks that
    several segments run, so that a bundle holds their weights once. Each outputs new values alone, and the
    graph of `file` reads what they gave. Left out of the file if there are none, as in most bundles.
    """

    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    before: tuple[Variant, ...] = ()

    @property
    def graphs(self) -> tuple[Variant, ...]:
        """The graphs in the order in which they run; the last one gives the signals."""
        return (*self.before, dataclasses.replace(self, before=())) if self.before else (self,)

    @property
    def updates(self) -> tuple[str, ...]:
        """Names of the tensors for which it outputs new values, once for each graph that does."""
        outputs = (tensor.name for graph in self.graphs for tensor in graph.outputs)
        return tuple(name.removeprefix(NEXT) for name in outputs if name.startswith(NEXT))


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of a graph for one row of n tokens: token * n + pair * n * n + row."""

    token: int = 0
    pair: int = 0
    row: int = 0

    def of(self, tokens: float) -> float:
        """Number of multiply-accumulates for one row of this many tokens."""
        return self.token * tokens + self.pair * tokens * tokens + self.row


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks (1-based) exported as one graph for each variant, with the exit that follows them.

    The stem, a head and a draft head are segments without blocks.
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
    """How a bundle turns text into token ids.

    tokenizer: its file. prefix: text before the (first) text. pad_id: the padding id. longest: most tokens of
    a row.
    """

    tokenizer: str
    prefix: str
    pad_id: int
    longest: int


@dataclass(frozen=True)
class ImageInput:
    """How a bundle turns an image into pixel_values [batch, 3, height, width]; steps in this order.

    resize: (n,) the shorter side to n pixels, keeping the shape; (height, width) exactly; () not at all.
    resample: Pillow's name of the filter. Then the centre of height, width is cut out. scale: factor of the
    values 0..255; then mean is subtracted and the result divided by std, one number each for the channels in
    the order of `channels`.
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
class Task:
    """What the bundles of a task have.

    inputs: the types that Manifest.input may have. least_labels: names that it needs; 0: it has none.
    thresholds: whether each label has one. logits, answer: shapes of these outputs of every segment, None if
    there is no such output; "labels" stands for the number of labels, "size" for any number from 2.
    one_label: whether one label of a row is right, so that segments may have error forecasts, and operating
    points calibrations. stem_inputs: tensors that the stem must read, and that no other task has.
    """

    kind: str
    inputs: tuple[type[TextInput] | type[ImageInput], ...] = (TextInput, ImageInput)
    least_labels: int = 0
    thresholds: bool = False
    logits: tuple[int | str, ...] | None = None
    answer: tuple[int | str, ...] | None = None
    one_label: bool = False
    stem_inputs: tuple[Tensor, ...] = ()


# 1 at the first token of each word, else 0, also at special tokens and padding.
WORD_STARTS = Tensor("word_starts", "int64", ("batch", "seq"))
# What every text becomes for the stem of a network whose rows are walked once.
TEXT_INPUTS = tuple(
    Tensor(name, "int64", ("batch", "seq")) for name in ("input_ids", "attention_mask", "token_type_ids")
)
_LABELS = ("batch", "labels")
_DECISION = ("batch", 2)  # the least certain decision of a row and its nearest alternative: (m, 0), m >= 0
TASKS: Mapping[str, Task] = {
    "text-classification": Task(CLASSIFICATION, (TextInput,), 2, logits=_LABELS, one_label=True),
    "image-classification": Task(CLASSIFICATION, (ImageInput,), 2, logits=_LABELS, one_label=True),
    GENERATION: Task(GENERATION, (TextInput,)),
    MULTI_LABEL: Task(MULTI_LABEL, least_labels=1, thresholds=True, logits=_DECISION, answer=_LABELS),
    TOKENS: Task(
        TOKENS,
        (TextInput,),
        least_labels=2,
        logits=_DECISION,
        answer=("batch", "seq", "labels"),
        stem_inputs=(WORD_STARTS,),
    ),
    REGRESSION: Task(REGRESSION, answer=("batch", 1)),
    EMBEDDING: Task(EMBEDDING, (TextInput,), answer=("batch", "size")),
}


@dataclass(frozen=True)
class RuleSpec:
    """A rule's name and its parameters; offramp.runtime.rules.bind makes the rule from it.

    temperatures [segments]: the logits of each exit are divided by its own before the rule reads how certain
    they are. score_temperatures [segments]: the same for the probabilities that answers state. skipped: for
    rule skip, the segments (numbers from 1) that answers do not run. All three are left out of the file if
    there are none.
    """

    name: str
    parameters: dict[str, float]
    temperatures: tuple[float, ...] = ()
    score_temperatures: tuple[float, ...] = ()
    skipped: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The rule in one line, such as "gate threshold=0.7" or "skip:-3-7"."""
        listed = "".join(f"-{number}" for number in self.skipped)
        name = f"{self.name}:{listed}" if listed else self.name
        return " ".join([name, *(f"{part}={value:g}" for part, value in self.parameters.items())])


@dataclass(frozen=True)
class StepCosts:
    """Cost of running each segment in one unit, for a row of `tokens` tokens.

    steps: variant -> one number for each segment, with its exit, policy and forecast; without the stem.
    """

    tokens: int
    steps: dict[str, tuple[float, ...]]


@dataclass(frozen=True)
class Calibration:
    """How answers at an operating point state probabilities that hold, and sets of labels that are right.

    temperatures [segments]: the logits of an exit are divided by its own. The set of an answer holds every
    label whose score, 1 minus its probability at that temperature, is at most the quantile; it contains the
    right label with probability `coverage`. quantiles [segments]: for answers of each exit; quantile: one for
    the answers of all exits.
    """

    coverage: float
    temperatures: tuple[float, ...]
    quantiles: tuple[float, ...]
    quantile: float


@dataclass(frozen=True)
class Guarantee:
    """A bound on a risk of the answers at an operating point, for rows drawn as the calibration rows were.

    risk: what is bounded: "disagreement", the share of rows whose answer is not that of full depth of the
    default variant; "error_increase", the accuracy that is lost against that full depth; or "<name>_loss", 1
    minus a quality. limit: the risk (a share) that was asked for. confidence: the probability, over the draw
    of the calibration rows, with which the risk is at most the limit. rows: their number. observed: the mean
    risk on them. bound: the upper bound of the risk at this confidence from the rows alone, were no other
    setting tried; bound_name: how it is computed. groups: "all", or "class" or "exit" if the limit holds for
    the rows of each predicted class, or of each exit.
    """

    risk: str
    limit: float
    confidence: float
    rows: int
    observed: float
    bound: float
    bound_name: str
    groups: str = "all"


@dataclass(frozen=True)
class OperatingPoint:
    """A named setting of a rule with the accuracy and cost measured for it on a split of a data set.

    calibration: that of its answers; left out of the file if it was not measured. guarantee: the risk that
    its answers keep; without one, measured figures are those of the rows on which the point was chosen, and
    promise nothing of other rows. exit_rows [segments]: how many of these rows left at each exit. Both are
    left out of the file if there are none.
    """

    name: str
    rule: RuleSpec
    variant: str
    data: str
    split: str
    measured: dict[str, float]
    calibration: Calibration | None = None
    guarantee: Guarantee | None = None
    exit_rows: tuple[int, ...] = ()


@dataclass(frozen=True)
class FileFact:
    """Expected sha256 (lower-case hex) and size in bytes of a file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class RotationFacts:
    """Rotation of the first 2 * len(frequencies) numbers of every head of queries and keys by its position.

    The first half of them is rotated with the second half. frequencies: radians a position, each a float32.
    factor: of sine and cosine.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0


@dataclass(frozen=True)
class DecoderFacts:
    """The part of a manifest that only decoders have.

    head: the graph that computes logits from the hidden state after any segment. stop: ids that end an
    answer. cache_fills: one graph for each segment, in the order of their blocks, that computes keys and
    values of tokens which exited before the segment, from their hidden state; every segment but the first has
    one, or none has. draft: a head with fewer ids, the first of the vocabulary, for draft tokens that are
    verified later. cache: APPENDED or IN_PLACE. rotations: for caches that grow in place, the rotations whose
    tables the segments read, by name; see table_names. windows: for such caches, to how many tokens blocks
    attend that do not attend to all. draft_block: a block of its own that predicts the hidden state after the
    last segment, for drafts. It reads what segments read and PREVIOUS_HIDDEN, and puts out EXIT_HIDDEN; its
    number is one more than the last block. These four are left out of the file where they are the default.
    """

    head: Segment
    stop: tuple[int, ...]
    cache_fills: tuple[Segment, ...] = ()
    draft: Segment | None = None
    cache: str = APPENDED
    rotations: dict[str, RotationFacts] = field(default_factory=dict)
    windows: tuple[int, ...] = ()
    draft_block: Segment | None = None

    @property
    def drafting(self) -> tuple[Segment, ...]:
        """The graphs for drafts that exist: draft head and draft block."""
        return tuple(part for part in (self.draft, self.draft_block) if part is not None)


@dataclass(frozen=True)
class Manifest:
    """The complete description of a bundle for the runtime.

    segments: in walking order; all offer the same variants, the first of which is the default ("fp32").
    task: a name in TASKS. input: a TextInput or an ImageInput, which differ in their fields. vocab_size: 0
    for images. labels: empty for tasks without labels. decoder: facts of decoders; left out of the
    file for classifiers. rule: the rule if the caller names none. files: every file of the bundle but the
    manifest itself. costs: by unit ("bops": bit operations, "ms": milliseconds of one row, measured on an
    engine), for rules that choose between variants; left out of the file if there are none. thresholds: the
    probability from which each label of several is given; left out of the file for other tasks.
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
    thresholds: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        """The kind of the task: "classification" of texts or images, else the task itself."""
        return TASKS[self.task].kind

    @property
    def classes(self) -> int:
        """Size of the logits that a segment outputs for a row; 0 if it outputs none."""
        return self._last_size("logits")

    @property
    def answer_size(self) -> int:
        """Numbers of the output `answer` for a row, or for a token; 0 if there is no such output."""
        return self._last_size("answer")

    @property
    def graph_files(self) -> frozenset[str]:
        """Names of all files that are graphs."""
        parts = [self.stem, *self.segments]
        if self.decoder is not None:
            parts += [self.decoder.head, *self.decoder.cache_fills, *self.decoder.drafting]
        variants = (variant for part in parts for variant in part.variants.values())
        return frozenset(graph.file for variant in variants for graph in (*variant.before, variant))

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants that every segment has, the default first; plans hold indices of this."""
        return tuple(self.segments[0].variants)

    def to_json(self) -> str:
        """The manifest as JSON text: in the order of this class, indented by one, a newline at the end.

        Raises ValueError for NaN.
        """
        facts = dataclasses.asdict(self)
        for name in ("costs", "decoder", "thresholds"):
            if not facts[name]:  # files without them stay as in earlier versions
                del facts[name]
        if (decoder := facts.get("decoder")) is not None:
            if decoder["cache"] == APPENDED:
                del decoder["cache"]
            for name in ("rotations", "windows", "draft_block"):
                if not decoder[name]:
                    del decoder[name]
        for point in facts["points"]:
            for name in ("calibration", "guarantee", "exit_rows"):
                if not point[name]:
                    del point[name]
        for rule in (facts["rule"], *(point["rule"] for point in facts["points"])):
            for name in ("temperatures", "score_temperatures", "skipped"):
                if not rule[name]:
                    del rule[name]
        for part in ("stem", "segments", "decoder"):
            _drop_empty(facts.get(part), "before")
        return json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def _last_size(self, output: str) -> int:
        tensors = (tensor for tensor in self.segments[0].first_graph.outputs if tensor.name == output)
        sizes = (size for tensor in tensors for size in tensor.shape[-1:])
        return next((size for size in sizes if isinstance(size, int)), 0)


def _drop_empty(value: Any, key: str) -> None:
    """Remove this key from all objects inside of a value in which it holds nothing."""
    if isinstance(value, dict):
        if not value.get(key, True):
            del value[key]
        value = value.values()
    if not isinstance(value, (str, int, float, type(None))):
        for inner in value:
            _drop_empty(inner, key)
