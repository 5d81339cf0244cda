"""Checks of a manifest that its types cannot express: numbers, names and tensors must fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offramp.runtime.bundle import fields
from offramp.runtime.bundle.external import SUFFIX
from offramp.runtime.bundle.graph_checks import MAX_BYTES
from offramp.runtime.bundle.manifest import (
    APPENDED,
    AXES,
    CHANNELS,
    DTYPES,
    FILE_NAME,
    FORMAT,
    GENERATION,
    GROUPS,
    IN_PLACE,
    NEXT,
    RESAMPLING,
    SIGNALS,
    SIGNATURE_NAME,
    TASKS,
    TEXT_INPUTS,
    Calibration,
    Guarantee,
    ImageInput,
    Manifest,
    Segment,
    StepCosts,
    Task,
    Tensor,
    TextInput,
    Variant,
)
from offramp.runtime.bundle.rule_checks import check_rule
from offramp.runtime.bundle.strict_json import build_value, parse_json
from offramp.runtime.errors import BadManifest

_LONGEST_MESSAGE = 600  # characters


def check_manifest(manifest: Manifest) -> None:
    """Raise ValueError if two fields of a manifest contradict each other; the message names the field."""
    fields.one_of("format", manifest.format, (FORMAT,))
    fields.one_of("task", manifest.task, TASKS)
    task = TASKS[manifest.task]
    decoder = task.kind == GENERATION
    if decoder == (manifest.decoder is None):
        raise ValueError(f"decoder: {'missing' if decoder else 'there is none'} for task {manifest.task}")
    _check_labels(manifest, task)
    fields.within("hidden_size", manifest.hidden_size, 1, fields.LARGEST_SIZE)
    fields.within("blocks", manifest.blocks, 1, fields.MOST_BLOCKS)
    if not manifest.segments:
        raise ValueError("segments: there is none")
    if manifest.stem.blocks:
        raise ValueError(f"stem.blocks: the stem has no blocks, found {list(manifest.stem.blocks)}")
    walked = [block for segment in manifest.segments for block in segment.blocks]
    if (
        len(walked) != manifest.blocks
        or walked != list(range(1, manifest.blocks + 1))
        or not all(s.blocks for s in manifest.segments)
    ):
        raise ValueError(f"segments: their blocks must be 1 to {manifest.blocks} in order, found {walked}")
    named = (manifest.stem, *manifest.segments)
    fields.unique("segments", [segment.name for segment in named])
    fields.short("segments", [name for segment in named for name in (segment.name, *segment.variants)])
    if not manifest.variants:
        raise ValueError("segments[0].variants: there is none")
    if manifest.decoder is not None:
        from offramp.runtime.bundle import decoder_checks  # here: a classifier does not need it

        decoder_checks.check_cache(manifest.decoder)
        for where, segment in decoder_checks.decoder_graphs(manifest):
            _check_decoder_graphs(where, segment, manifest)
        decoder_checks.check_decoder(manifest)
    else:
        _check_graphs(manifest, task)
    for unit, costs in manifest.costs.items():
        _check_costs(f"costs[{unit!r}]", costs, manifest)
    fields.unique("points", [point.name for point in manifest.points])
    fields.short("points", [point.name for point in manifest.points])
    for index, point in enumerate(manifest.points):
        fields.one_of(f"points[{index}].variant", point.variant, manifest.variants)
        if point.calibration is not None:
            _check_calibration(f"points[{index}].calibration", point.calibration, manifest, task)
        if point.guarantee is not None:
            _check_guarantee(f"points[{index}].guarantee", point.guarantee)
        check_rule(f"points[{index}].rule", point.rule, manifest)
        rows = point.exit_rows
        if rows and (len(rows) != len(manifest.segments) or min(rows) < 0):
            raise ValueError(f"points[{index}].exit_rows: expected a number of rows from 0 for each segment")
    check_rule("rule", manifest.rule, manifest)
    graphs = manifest.graph_files
    for name, fact in manifest.files.items():
        fields.plain(f"files[{name!r}]", name)
        largest = MAX_BYTES if name in graphs else fields.LARGEST_FILE
        if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in graphs:
            largest = fields.LARGEST_WEIGHTS
        fields.within(f"files[{name!r}].bytes", fact.bytes, 0, largest)
        if len(fact.sha256) != 64 or set(fact.sha256) - set("0123456789abcdef"):
            raise ValueError(
                f"files[{name!r}].sha256: expected 64 lower-case hex digits, found {fact.sha256!r}"
            )
    if {FILE_NAME, SIGNATURE_NAME} & manifest.files.keys():
        raise ValueError(f"files: {FILE_NAME} cannot list itself, nor {SIGNATURE_NAME}, which is made of it")
    reads = type(manifest.input)
    fields.one_of("task", manifest.task, [name for name, known in TASKS.items() if reads in known.inputs])
    if isinstance(manifest.input, TextInput):
        _check_text(manifest.input, manifest)
    else:
        _check_images(manifest.input, manifest)


def _check_labels(manifest: Manifest, task: Task) -> None:
    """Check that there are as many names of labels, and thresholds, as the task has."""
    fields.unique("labels", manifest.labels)
    labels = len(manifest.labels)
    if labels < task.least_labels or (labels and not task.least_labels):
        count = f"{task.least_labels} or more" if task.least_labels else "none"
        raise ValueError(f"labels: {manifest.task} has {count}, found {list(manifest.labels)}")
    limits = list(manifest.thresholds)
    if len(limits) != (labels if task.thresholds else 0):
        count = f"{labels}, one a label" if task.thresholds else "none"
        raise ValueError(f"thresholds: {manifest.task} has {count}, found {limits}")
    if not all(0 < threshold < 1 for threshold in limits):
        raise ValueError(f"thresholds: they are probabilities above 0 and below 1, found {limits}")


def _check_text(text: TextInput, manifest: Manifest) -> None:
    fields.within("vocab_size", manifest.vocab_size, 1, fields.LARGEST_SIZE)
    fields.within("input.longest", text.longest, 1, fields.LONGEST_INPUT)
    fields.within("input.pad_id", text.pad_id, 0, manifest.vocab_size - 1)
    fields.within("input.prefix: its length", len(text.prefix), 0, fields.LONGEST_PREFIX)
    fields.listed("input.tokenizer", text.tokenizer, manifest.files)


def _check_images(image: ImageInput, manifest: Manifest) -> None:
    fields.one_of("vocab_size", manifest.vocab_size, (0,))
    fields.one_of("input.resample", image.resample, RESAMPLING)
    fields.one_of("input.channels", image.channels, CHANNELS)
    for field, sizes in (("height", [image.height]), ("width", [image.width]), ("resize", image.resize)):
        for size in sizes:
            fields.within(f"input.{field}", size, 1, fields.LARGEST_IMAGE)
    if len(image.resize) > 2:
        raise ValueError(f"input.resize: expected at most two sizes, found {list(image.resize)}")
    for field, numbers in (("mean", image.mean), ("std", image.std)):
        if len(numbers) != 3:
            raise ValueError(f"input.{field}: expected one number a channel, 3, found {list(numbers)}")
    if min(image.std) <= 0 or image.scale <= 0:
        raise ValueError(f"input: scale {image.scale} and std {list(image.std)} must be above 0")
    expected = ("batch", 3, image.height, image.width)
    for variant in manifest.stem.variants.values():
        shapes = [tensor.shape for tensor in variant.inputs]
        if shapes != [expected]:
            raise ValueError(f"stem: it reads {shapes}, images come as {list(expected)}")
        hidden = next((tensor for tensor in variant.outputs if tensor.name == "hidden"), None)
        if hidden is None or len(hidden.shape) != 3 or not isinstance(hidden.shape[1], int):
            raise ValueError("stem: of an image 'hidden' is [batch, a fixed number of tokens, hidden size]")


def _check_graphs(manifest: Manifest, task: Task) -> None:
    """Check that stem and segments of a bundle whose rows are walked once fit together."""
    if manifest.variants[0] not in manifest.stem.variants:
        raise ValueError(f"stem.variants: the default variant {manifest.variants[0]!r} is missing")
    named_segments = [("stem", manifest.stem)] + [
        (f"segments[{i}]", segment) for i, segment in enumerate(manifest.segments)
    ]
    stem_outputs: dict[str, Tensor] = {}  # by name
    for where, segment in named_segments:
        if segment is not manifest.stem and tuple(segment.variants) != manifest.variants:
            raise ValueError(f"{where}.variants: all segments offer {list(manifest.variants)}, in that order")
        for field in ("token", "pair", "row"):
            fields.within(f"{where}.macs.{field}", getattr(segment.macs, field), 0)
        tensors = [
            [sorted(map(repr, (*graph.inputs, *graph.outputs))) for graph in variant.graphs]
            for variant in segment.variants.values()
        ]
        for variant, variant_tensors in zip(segment.variants, tensors, strict=True):
            if variant_tensors != tensors[0]:
                raise ValueError(
                    f"{where}.variants[{variant!r}]: tensors other than those of the first variant"
                )
        for name, graph in segment.variants.items():
            _check_variant(f"{where}.variants[{name!r}]", graph, manifest)
        facts = segment.first_graph
        if segment is manifest.stem:
            _check_nothing_before(where, segment)
            stem_outputs = {tensor.name: tensor for tensor in facts.outputs}
            if "hidden" not in stem_outputs:
                raise ValueError("stem: it has no output 'hidden'")
            _check_stem_inputs(manifest, task)
        else:
            _check_segment(where, facts, stem_outputs, task, last=segment is manifest.segments[-1])
            _check_forecast(
                where, facts, manifest, ahead=len(named_segments) - 1 - named_segments.index((where, segment))
            )


def _check_stem_inputs(manifest: Manifest, task: Task) -> None:
    """Check that the stem reads what texts become: the tensors that its task adds, and none of another task.

    What the stem of images reads is checked with their input.
    """
    for name, other in TASKS.items():
        for tensor in other.stem_inputs:
            for variant in manifest.stem.variants.values():
                form = f"{tensor.dtype} {list(tensor.shape)}"
                if other is task and tensor not in variant.inputs:
                    raise ValueError(f"stem: for {name} it reads {tensor.name}, {form}, which is missing")
                if other is not task and tensor.name in (read.name for read in variant.inputs):
                    raise ValueError(f"stem: its input {tensor.name} is for {name}, not for {manifest.task}")
    if not isinstance(manifest.input, TextInput):
        return
    known = (*TEXT_INPUTS, *task.stem_inputs)
    for variant in manifest.stem.variants.values():
        for tensor in variant.inputs:
            if tensor not in known:
                raise ValueError(
                    f"stem: its input {tensor.name!r:.80}, {tensor.dtype} {list(tensor.shape)}, cannot be "
                    f"made from text; {', '.join(other.name for other in known)} can, int64 [batch, seq]"
                )


def _check_segment(
    where: str, facts: Variant, stem_outputs: dict[str, Tensor], task: Task, *, last: bool
) -> None:
    """Check that a segment reads outputs of the stem, and outputs signals and new values of its inputs."""
    has = {"logits": task.logits is not None, "gate": True, "forecast": task.one_label}
    has["answer"] = task.answer is not None
    signals = [name for name in SIGNALS if has[name]]
    for number, graph in enumerate(facts.before):
        _check_segment_tensors(f"{where}.before[{number}]", graph, stem_outputs, ())
    _check_segment_tensors(where, facts, stem_outputs, signals)
    outputs = {tensor.name for tensor in facts.outputs}
    for name in ("logits", "answer"):
        if name in signals and name not in outputs:
            raise ValueError(f"{where}: it has no output {name!r}; every segment ends with an exit")
    if not last and "hidden" not in facts.updates:
        raise ValueError(f"{where}: it has no output '{NEXT}hidden' for the segment after it")


def _check_segment_tensors(
    where: str, graph: Variant, stem_outputs: dict[str, Tensor], signals: Sequence[str]
) -> None:
    """Check that a graph reads outputs of the stem, and outputs new values of them, or these signals."""
    for tensor in graph.inputs:
        if stem_outputs.get(tensor.name) != tensor:
            raise ValueError(
                f"{where}: its input {tensor.name} {list(tensor.shape)} is not an output of the stem"
            )
    for tensor in graph.outputs:
        if tensor.name in signals:
            continue
        read = stem_outputs.get(tensor.name.removeprefix(NEXT)) if tensor.name.startswith(NEXT) else None
        if read is None:
            known = " or ".join([*([", ".join(signals)] if signals else []), f"{NEXT}<a tensor of the stem>"])
            raise ValueError(f"{where}: output {tensor.name!r}; expected {known}")
        if (read.dtype, read.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{where}: output {tensor.name} differs from {read.name} in dtype or shape")


def _check_forecast(where: str, facts: Variant, manifest: Manifest, *, ahead: int) -> None:
    """Check the size of forecasts: one number for an exit here and one for every (variant, exit ahead).

    These numbers exist for each variant in which a row may have come to the segment.
    """
    variants = len(manifest.variants)
    right = ("batch", variants * (1 + variants * ahead))
    for tensor in facts.outputs:
        if tensor.name == "forecast" and tensor.shape != right:
            raise ValueError(f"{where}: forecast must be {list(right)}, found {list(tensor.shape)}")


def _check_calibration(where: str, calibration: Calibration, manifest: Manifest, task: Task) -> None:
    if not task.one_label:
        raise ValueError(f"{where}: {manifest.task} has none; calibrations are for one label a row")
    for field in ("temperatures", "quantiles"):
        if len(getattr(calibration, field)) != len(manifest.segments):
            raise ValueError(f"{where}.{field}: expected {len(manifest.segments)} numbers, one a segment")
    if min(calibration.temperatures) <= 0:
        raise ValueError(f"{where}.temperatures: they must be above 0")
    shares = (calibration.coverage, calibration.quantile, *calibration.quantiles)
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"{where}: coverage and quantiles lie in 0..1")


def _check_guarantee(where: str, guarantee: Guarantee) -> None:
    fields.one_of(f"{where}.groups", guarantee.groups, GROUPS)
    fields.within(f"{where}.rows", guarantee.rows, 1)
    for field in ("limit", "confidence"):
        if not 0 < getattr(guarantee, field) < 1:
            raise ValueError(
                f"{where}.{field}: it lies above 0 and below 1, found {getattr(guarantee, field)}"
            )
    for field in ("observed", "bound"):  # an increase of errors is below 0 where early answers are better
        if not -1 <= getattr(guarantee, field) <= 1:
            raise ValueError(f"{where}.{field}: it lies in -1..1, found {getattr(guarantee, field)}")


def _check_costs(where: str, costs: StepCosts, manifest: Manifest) -> None:
    fields.within(f"{where}.tokens", costs.tokens, 1)
    if tuple(costs.steps) != manifest.variants:
        raise ValueError(f"{where}.steps: expected {list(manifest.variants)}, found {list(costs.steps)}")
    for variant, steps in costs.steps.items():
        if len(steps) != len(manifest.segments) or min(steps) < 0 or not sum(steps):
            raise ValueError(
                f"{where}.steps[{variant!r}]: expected {len(manifest.segments)} costs from 0, one a segment, "
                f"found {list(steps)}"
            )


def _check_variant(where: str, variant: Variant, manifest: Manifest) -> None:
    fields.listed(f"{where}.file", variant.file, manifest.files)
    cache = None if manifest.decoder is None else manifest.decoder.cache
    of_caches = {"past": APPENDED, "places": IN_PLACE}
    axes = [axis for axis in AXES if axis not in of_caches or of_caches[axis] == cache]
    for side, tensors in (("inputs", variant.inputs), ("outputs", variant.outputs)):
        fields.unique(f"{where}.{side}", [tensor.name for tensor in tensors])
        fields.short(f"{where}.{side}", [tensor.name for tensor in tensors])
        for index, tensor in enumerate(tensors):
            fields.one_of(f"{where}.{side}[{index}].dtype", tensor.dtype, DTYPES)
            fields.shape(f"{where}.{side}[{index}].shape", tensor.shape, axes)
    for number, graph in enumerate(variant.before):
        if graph.before:
            raise ValueError(
                f"{where}.before[{number}].before: it runs before another, so nothing runs before it"
            )
        _check_variant(f"{where}.before[{number}]", graph, manifest)
    task = TASKS[manifest.task]
    for tensor in () if task.kind == GENERATION else variant.outputs:  # _check_decoder checks its outputs
        _check_signal(where, tensor, manifest, {"logits": task.logits, "answer": task.answer})


def _check_nothing_before(where: str, segment: Segment) -> None:
    for name, variant in segment.variants.items():
        if variant.before:
            raise ValueError(
                f"{where}.variants[{name!r}].before: graphs run before those of a classifier's segments alone"
            )


def _check_signal(
    where: str, tensor: Tensor, manifest: Manifest, shapes: Mapping[str, tuple[int | str, ...] | None]
) -> None:
    """Check the shape of one signal; shapes: those of logits and answer as the task has them, see Task."""
    expected = {**shapes, "gate": ("batch",)}.get(tensor.name)
    if expected is None:
        return
    # All embeddings are as long as that of the first segment, as they are compared.
    sizes: dict[int | str, int] = {"labels": len(manifest.labels), "size": max(2, manifest.answer_size)}
    right = tuple(sizes.get(size, size) for size in expected)
    if tensor.shape != right:
        what: dict[int | str, str] = {
            "labels": ", one a label",
            "size": " or longer, as in all segments",
        }
        raise ValueError(
            f"{where}: {tensor.name} must be [{', '.join(map(str, right))}]"
            f"{what.get(expected[-1], '')}, found {list(tensor.shape)}"
        )
    if tensor.name == "answer" and tensor.dtype != "float32":
        raise ValueError(f"{where}: answer must be float32, found {tensor.dtype}")


def _check_decoder_graphs(where: str, segment: Segment, manifest: Manifest) -> None:
    """Check MACs, variants and tensors of one segment, stem, cache fill or head."""
    for field in ("token", "pair", "row"):
        fields.within(f"{where}.macs.{field}", getattr(segment.macs, field), 0)
    if segment.blocks and tuple(segment.variants) != manifest.variants:
        raise ValueError(f"{where}.variants: all segments offer {list(manifest.variants)}, in that order")
    if manifest.variants[0] not in segment.variants:
        raise ValueError(f"{where}.variants: the default variant {manifest.variants[0]!r} is missing")
    first = segment.first_graph
    _check_nothing_before(where, segment)
    for name, graph in segment.variants.items():
        _check_variant(f"{where}.variants[{name!r}]", graph, manifest)
        if (graph.inputs, graph.outputs) != (first.inputs, first.outputs):
            raise ValueError(f"{where}.variants[{name!r}]: tensors other than those of the first variant")


def _one_line(text: str) -> str:
    """Text for a message: keys of a hostile manifest may be long, and control the terminal."""
    shown = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]} ..."
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in shown)


def read_manifest(text: str, *, source: str) -> Manifest:
    """Read a manifest from JSON text and check it; raises BadManifest, which names the field.

    source: the file that errors name.
    """
    try:
        value = parse_json(text)
        if isinstance(value, dict) and value.get("format", FORMAT) != FORMAT:
            # Checked first: other errors about an unknown format would be misleading.
            raise ValueError(f"format: {value['format']!r} is not known; this version reads format {FORMAT}")
        manifest: Manifest = build_value(Manifest, value, "manifest")
        check_manifest(manifest)
    except RecursionError:
        raise BadManifest(f"{source}: nested too deeply, so it is no manifest of offramp") from None
    except ValueError as problem:
        cure = "write the bundle again with ee-split, or use the offramp version that wrote it"
        raise BadManifest(f"{source}: {_one_line(str(problem))}; {cure}") from problem
    return manifest
