"""The model card of a bundle on a hub (README.md), made from the manifest alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from offramp.runtime.bundle.manifest import (
    CLASSIFICATION,
    EMBEDDING,
    GENERATION,
    MULTI_LABEL,
    REGRESSION,
    TOKENS,
    ImageInput,
    Manifest,
    OperatingPoint,
)
from offramp.runtime.hub.reference import MAIN, PREFIX

CARD_NAME = "README.md"
SHOWN = 20  # labels
# Tasks by the names under which the hub lists models; it has none for several labels and for numbers.
PIPELINES: Mapping[str, str] = {
    CLASSIFICATION: "text-classification",
    MULTI_LABEL: "text-classification",
    REGRESSION: "text-classification",
    TOKENS: "token-classification",
    EMBEDDING: "feature-extraction",
    GENERATION: "text-generation",
}
# Expressions of an answer in Python, by kind of task.
_PRINTED: Mapping[str, str] = {
    CLASSIFICATION: "answer.label, answer.score, answer.exit",
    MULTI_LABEL: "answer.labels, answer.scores, answer.exit",
    REGRESSION: "answer.value, answer.exit",
    TOKENS: "answer.entities, answer.exit",
    EMBEDDING: "answer.embedding, answer.exit",
}
# Figures of a point that are no quality of its answers.
_COSTS = ("mean_exit", "depth", "layers_saved", "macs_saved", "low", "high")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def model_card(manifest: Manifest, repository: str, revision: str = MAIN) -> str:
    """The card of a bundle as Markdown with a YAML head; the same manifest always gives the same card.

    repository: "user/name", which the commands of the card name, with the revision unless it is main.
    """
    name = f"{PREFIX}{repository}" if revision == MAIN else f"{PREFIX}{repository}@{revision}"
    head = ["---", *_head(manifest), "---"]
    return "\n".join([*head, "", *_about(manifest, repository), *_points(manifest), *_usage(manifest, name)])


def _head(manifest: Manifest) -> Iterable[str]:
    images = isinstance(manifest.input, ImageInput)
    tags = ["offramp", "early-exit", "onnx", manifest.task]
    tags += [value for key in ("backbone", "recipe") if (value := _text(manifest.provenance, key))]
    yield "library_name: offramp"
    yield f"pipeline_tag: {'image-classification' if images else PIPELINES[manifest.kind]}"
    yield "tags:"
    yield from (f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags))  # a string of JSON is one of YAML
    for key in ("base_model", "license"):
        value = _text(manifest.provenance, key)
        if value and (key == "license" or _HUB_NAME.fullmatch(value)):  # not a folder of the one who trained
            yield f"{key}: {json.dumps(value)}"


def _about(manifest: Manifest, repository: str) -> Iterable[str]:
    size = sum(fact.bytes for fact in manifest.files.values())
    facts = {
        "task": manifest.task,
        "labels": _labels(manifest.labels),
        "network": f"{manifest.blocks} blocks, hidden size {manifest.hidden_size}",
        "backbone": _text(manifest.provenance, "backbone"),
        "recipe": _text(manifest.provenance, "recipe"),
        "trained on": _text(_mapping(manifest.provenance, "data"), "name"),
        "exits after block": ", ".join(
            str(segment.blocks[-1]) for segment in manifest.segments if segment.blocks
        ),
        "precisions": ", ".join(manifest.variants),
        "files": f"{len(manifest.files)}, {size / 1e6:.1f} MB",
    }
    yield f"# {_cell(repository.partition('/')[2])}"
    yield ""
    yield "A bundle of offramp: a transformer that is split into ONNX segments and stops at the first exit"
    yield "that is good enough."
    yield ""
    yield from _table(("", ""), [(key, _cell(value)) for key, value in facts.items() if value])
    yield ""


def _points(manifest: Manifest) -> Iterable[str]:
    if not manifest.points:
        return
    yield "## Operating points"
    yield ""
    header = ("point", "rule", "precision", "what it states", "quality", "mean depth", "blocks saved")
    by_depth = sorted(manifest.points, key=lambda point: -_depth(point, manifest.blocks))
    yield from _table(header, [_row(point, manifest.blocks) for point in by_depth])
    yield ""
    yield "The deepest point comes first. A measured point promises nothing of other rows than those it was"
    yield "measured on; what a guaranteed point states holds for rows drawn as its calibration rows were."
    yield ""


def _row(point: OperatingPoint, blocks: int) -> tuple[str, ...]:
    parameters = [f"{name}={value:.4g}" for name, value in point.rule.parameters.items()]
    depth = _depth(point, blocks)
    costs = (f"{depth:.2f} of {blocks}", f"{100 * (1 - depth / blocks):.1f} %") if depth >= 0 else ("-", "-")
    return (
        _code(point.name),
        _cell(" ".join([point.rule.name, *parameters])),
        _cell(point.variant),
        _cell(_statement(point)),
        _cell(_quality(point.measured)),
        *costs,
    )


def _statement(point: OperatingPoint) -> str:
    promise = point.guarantee
    if promise is None:
        return " ".join(filter(None, ("measured on", point.data, point.split)))
    group = "" if promise.groups == "all" else f" of each {promise.groups}"
    return (
        f"guaranteed: {promise.risk.replace('_', ' ')}{group} at most {100 * promise.limit:g} %, confidence "
        f"{100 * promise.confidence:g} %, by {promise.rows} rows"
    )


def _quality(measured: Mapping[str, float]) -> str:
    """Figures of quality as "accuracy 89.79 (88.1 to 91.4)"; the interval belongs to the first of them."""
    texts = [f"{name} {value:.2f}" for name, value in measured.items() if name not in _COSTS]
    if texts and {"low", "high"} <= measured.keys():
        texts[0] += f" ({measured['low']:.1f} to {measured['high']:.1f})"
    return ", ".join(texts) or "-"


def _depth(point: OperatingPoint, blocks: int) -> float:
    """Mean number of blocks at which rows or tokens leave; -1 if the point does not state it."""
    depth = point.measured.get("mean_exit", point.measured.get("depth"))
    if depth is None and "layers_saved" in point.measured:
        depth = blocks * (1 - point.measured["layers_saved"] / 100)
    return -1.0 if depth is None else depth


def _usage(manifest: Manifest, name: str) -> Iterable[str]:
    images, generates = isinstance(manifest.input, ImageInput), manifest.kind == GENERATION
    extras = "cpu,hub,vision" if images else "cpu,hub"
    source = "image.jpg" if images else "prompts.txt" if generates else "input.txt"
    yield "## Run it"
    yield ""
    yield from (f"    pip install 'offramp[{extras}]'", f"    ee-run --bundle {name} {source}")
    if manifest.points:
        yield f"    ee-run --bundle {name} --point {_argument(manifest.points[0].name)} {source}"
    yield from ("", "```python", "from offramp.runtime import load", "", f'with load("{name}") as session:')
    if generates:
        yield '    for chunk in session.generate("Once upon a time"):'
        yield '        print(chunk.text, end="")'
    else:
        yield f"    answer = session({json.dumps(source if images else 'a stirring, funny film')})"
        yield f"    print({_PRINTED[manifest.kind]})"
    yield from (
        "```",
        "",
        "Every file is compared with its sha256 in `manifest.json` before it is opened.",
        "",
    )


def _labels(labels: Sequence[str]) -> str:
    more = f", ... {len(labels)} in all" if len(labels) > SHOWN else ""
    return ", ".join(labels[:SHOWN]) + more


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    for cells in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text of a manifest as plain text of a table: it can neither end the cell nor begin markup."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", printable)


def _code(text: str) -> str:
    """A name as code; a name with characters that would end it is plain text."""
    return f"`{text}`" if re.fullmatch(r"[\w.+-]+", text) else _cell(text)


def _argument(text: str) -> str:
    """A name as one word of a shell, on one line."""
    if re.fullmatch(r"[\w.+-]+", text, re.ASCII):
        return text
    return "'" + "".join(c if c.isprintable() else "?" for c in text).replace("'", "'\\''") + "'"


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    return value if isinstance(value, str) else ""


def _mapping(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    return value if isinstance(value, Mapping) else {}
