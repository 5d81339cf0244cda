"""What the types of a manifest cannot say: numbers, names and tensors that must fit together."""

from __future__ import annotations

from collections.abc import Iterable

from offramp.runtime.bundle.manifest import (
    AXES,
    CHANNELS,
    DTYPES,
    FILE_NAME,
    FORMAT,
    GENERATION,
    NEXT,
    RESAMPLING,
    SIGNALS,
    TASKS,
    ImageInput,
    Manifest,
    StepCosts,
    Tensor,
    TextInput,
    Variant,
)


def check(manifest: Manifest) -> None:
    """Raise ValueError naming the first field that contradicts another."""
    _one_of("format", manifest.format, (FORMAT,))
    _one_of("task", manifest.task, TASKS)
    _unique("labels", manifest.labels)
    decoder = manifest.task == GENERATION
    if decoder == (manifest.decoder is None):
        raise ValueError(f"decoder: {'missing' if decoder else 'there is none'} for task {manifest.task}")
    if decoder and manifest.labels:
        raise ValueError(f"labels: a decoder has none, found {list(manifest.labels)}")
    if not decoder and len(manifest.labels) < 2:
        raise ValueError(f"labels: a classifier has at least two, found {list(manifest.labels)}")
    for field in ("hidden_size", "blocks"):
        _at_least(field, getattr(manifest, field), 1)
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
    _unique("segments", [stage.name for stage in (manifest.stem, *manifest.segments)])
    if decoder:
        from offramp.runtime.bundle.decoder_checks import check_stages  # here: it needs this file's functions

        check_stages(manifest)
    else:
        _check_stages(manifest)
    for unit, costs in manifest.costs.items():
        _check_costs(f"costs[{unit!r}]", costs, manifest)
    _unique("points", [point.name for point in manifest.points])
    for index, point in enumerate(manifest.points):
        _one_of(f"points[{index}].variant", point.variant, manifest.variants)
    for name, fact in manifest.files.items():
        _plain(f"files[{name!r}]", name)
        _at_least(f"files[{name!r}].bytes", fact.bytes, 0)
        if len(fact.sha256) != 64 or set(fact.sha256) - set("0123456789abcdef"):
            raise ValueError(
                f"files[{name!r}].sha256: expected 64 lower-case hex digits, found {fact.sha256!r}"
            )
    if FILE_NAME in manifest.files:
        raise ValueError(f"files: {FILE_NAME} cannot list itself")
    if isinstance(manifest.input, TextInput):
        _check_text(manifest.input, manifest)
    else:
        _check_images(manifest.input, manifest)


def _check_text(text: TextInput, manifest: Manifest) -> None:
    _one_of("task", manifest.task, (TASKS[0], GENERATION))
    _at_least("vocab_size", manifest.vocab_size, 1)
    _at_least("input.longest", text.longest, 1)
    _at_least("input.pad_id", text.pad_id, 0)
    _listed("input.tokenizer", text.tokenizer, manifest)


def _check_images(image: ImageInput, manifest: Manifest) -> None:
    _one_of("task", manifest.task, TASKS[1:2])
    _one_of("vocab_size", manifest.vocab_size, (0,))
    _one_of("input.resample", image.resample, RESAMPLING)
    _one_of("input.channels", image.channels, CHANNELS)
    for field, sizes in (("height", [image.height]), ("width", [image.width]), ("resize", image.resize)):
        for size in sizes:
            _at_least(f"input.{field}", size, 1)
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


def _check_stages(manifest: Manifest) -> None:
    if not manifest.variants:
        raise ValueError("segments[0].variants: there is none")
    if manifest.variants[0] not in manifest.stem.variants:
        raise ValueError(f"stem.variants: the default variant {manifest.variants[0]!r} is missing")
    stages = [("stem", manifest.stem)] + [
        (f"segments[{i}]", stage) for i, stage in enumerate(manifest.segments)
    ]
    made: dict[str, Tensor] = {}  # what the stem puts out
    for where, stage in stages:
        if stage is not manifest.stem and tuple(stage.variants) != manifest.variants:
            raise ValueError(f"{where}.variants: all segments offer {list(manifest.variants)}, in that order")
        for field in ("token", "pair", "row"):
            _at_least(f"{where}.macs.{field}", getattr(stage.macs, field), 0)
        names = [tuple(sorted(t.name for t in (*v.inputs, *v.outputs))) for v in stage.variants.values()]
        for variant, found in zip(stage.variants, names, strict=True):
            if found != names[0]:
                raise ValueError(
                    f"{where}.variants[{variant!r}]: tensors other than those of the first variant"
                )
        for name, variant_facts in stage.variants.items():
            _check_variant(f"{where}.variants[{name!r}]", variant_facts, manifest)
        facts = next(iter(stage.variants.values()))
        if stage is manifest.stem:
            made = {tensor.name: tensor for tensor in facts.outputs}
            if "hidden" not in made:
                raise ValueError("stem: it has no output 'hidden'")
        else:
            _check_segment(where, facts, made, last=stage is manifest.segments[-1])
            _check_forecast(where, facts, manifest, ahead=len(stages) - 1 - stages.index((where, stage)))


def _check_segment(where: str, facts: Variant, made: dict[str, Tensor], *, last: bool) -> None:
    """A segment reads what the stem put out and puts out signals and new values of what it read."""
    for tensor in facts.inputs:
        if made.get(tensor.name) != tensor:
            raise ValueError(
                f"{where}: its input {tensor.name} {list(tensor.shape)} is not an output of the stem"
            )
    for tensor in facts.outputs:
        if tensor.name in SIGNALS:
            continue
        read = made.get(tensor.name.removeprefix(NEXT)) if tensor.name.startswith(NEXT) else None
        if read is None:
            raise ValueError(
                f"{where}: output {tensor.name!r}; expected {', '.join(SIGNALS)} or "
                f"{NEXT}<a tensor of the stem>"
            )
        if (read.dtype, read.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(f"{where}: output {tensor.name} differs from {read.name} in dtype or shape")
    outputs = {tensor.name for tensor in facts.outputs}
    if "logits" not in outputs:
        raise ValueError(f"{where}: it has no output 'logits'; every segment ends with an exit")
    if not last and f"{NEXT}hidden" not in outputs:
        raise ValueError(f"{where}: it has no output '{NEXT}hidden' for the segment after it")


def _check_forecast(where: str, facts: Variant, manifest: Manifest, *, ahead: int) -> None:
    """One number for leaving and one for every (variant, exit ahead), for each variant of the row so far."""
    variants = len(manifest.variants)
    right = ("batch", variants * (1 + variants * ahead))
    for tensor in facts.outputs:
        if tensor.name == "forecast" and tensor.shape != right:
            raise ValueError(f"{where}: forecast must be {list(right)}, found {list(tensor.shape)}")


def _check_costs(where: str, costs: StepCosts, manifest: Manifest) -> None:
    _at_least(f"{where}.tokens", costs.tokens, 1)
    if tuple(costs.steps) != manifest.variants:
        raise ValueError(f"{where}.steps: expected {list(manifest.variants)}, found {list(costs.steps)}")
    for variant, steps in costs.steps.items():
        if len(steps) != len(manifest.segments) or min(steps) < 0 or not sum(steps):
            raise ValueError(
                f"{where}.steps[{variant!r}]: expected {len(manifest.segments)} costs from 0, one a segment, "
                f"found {list(steps)}"
            )


def _check_variant(where: str, variant: Variant, manifest: Manifest) -> None:
    _listed(f"{where}.file", variant.file, manifest)
    for side, tensors in (("inputs", variant.inputs), ("outputs", variant.outputs)):
        _unique(f"{where}.{side}", [tensor.name for tensor in tensors])
        for index, tensor in enumerate(tensors):
            _one_of(f"{where}.{side}[{index}].dtype", tensor.dtype, DTYPES)
            for size in tensor.shape:
                if isinstance(size, str):
                    _one_of(f"{where}.{side}[{index}].shape", size, AXES)
                else:
                    _at_least(f"{where}.{side}[{index}].shape", size, 1)
    if manifest.task == GENERATION:
        return  # what comes out there, decoder_checks looks at
    for tensor in variant.outputs:
        classes = len(manifest.labels)
        if tensor.name == "logits" and tensor.shape != ("batch", classes):
            raise ValueError(
                f"{where}: logits must be [batch, {classes}], one a label, found {list(tensor.shape)}"
            )
        if tensor.name == "gate" and tensor.shape != ("batch",):
            raise ValueError(f"{where}: gate must be [batch], found {list(tensor.shape)}")


def _plain(where: str, name: str) -> None:
    """A plain file name: the bundle is one flat folder, so nothing in a manifest can point out of it."""
    if not name or name in (".", "..") or any(c in name for c in "/\\:\0") or not name.isprintable():
        raise ValueError(f"{where}: {name!r} is not a plain file name")


def _listed(where: str, name: str, manifest: Manifest) -> None:
    _plain(where, name)
    if name not in manifest.files:
        raise ValueError(f"{where}: {name!r} is not listed in files")


def _one_of(where: str, found: object, known: Iterable[object]) -> None:
    if found not in (known := list(known)):
        raise ValueError(f"{where}: {found!r}; expected one of {', '.join(map(repr, known))}")


def _at_least(where: str, found: int, least: int) -> None:
    if found < least:
        raise ValueError(f"{where}: {found}; expected {least} or more")


def _unique(where: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen or not name:
            raise ValueError(f"{where}: {name!r} is {'there twice' if name else 'empty'}")
        seen.add(name)
