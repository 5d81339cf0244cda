"""load(), which opens a bundle's folder as a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, TypeVar, cast

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import GENERATION, RuleSpec
from offramp.runtime.classifier import Classifier, checked_batch_size
from offramp.runtime.engines.base import Engine, EngineOptions, S, open_engine
from offramp.runtime.errors import BadSetting
from offramp.runtime.inputs.text import LONG_TEXTS, open_reader
from offramp.runtime.pipeline import BackgroundTask
from offramp.runtime.rules.base import Rule
from offramp.runtime.rules.resolve import bind_for_bundle, resolve_rule

if TYPE_CHECKING:
    from offramp.runtime.generator import TextGenerator
    from offramp.runtime.sequence import TokenSequence

T = TypeVar("T")
BATCH_SIZE = 32


def load(
    path: str | PathLike[str] = "bundle/",
    *,
    engine: str = "ort",
    device: str | None = None,
    variant: str | None = None,
    threads: int | None = None,
    global_pool: bool = True,
    rule: str | RuleSpec | None = None,
    threshold: float | None = None,
    point: str | None = None,
    batch_size: int = BATCH_SIZE,
    lazy: bool = False,
    share: bool = True,
    provider: str | None = None,
    cuda_graphs: bool = False,
    exit_kv: str = "deferred",
    long_texts: str = "cut",
) -> Classifier | TextGenerator:
    """Open a bundle folder as a session: a Classifier, or a TextGenerator for a decoder's bundle.

    Options that are not given come from the bundle's manifest. rule: a rule's name or a RuleSpec. threshold:
    the rule's main parameter (rule fixed: the exit; patience: the number of agreements). point: an operating
    point of the manifest, which sets rule and variant. threads: None is one for each core. global_pool: run
    all segments on one thread pool of the whole process, which is the fastest; from then on ONNX Runtime
    refuses sessions of the application that do not set use_per_session_threads = False. With False (or
    threads=1) other sessions of the process are not affected, at a cost of a few per cent. batch_size: most
    rows that are walked together. lazy: open a segment when a row first reaches it; the first answers are
    slower, and a segment that no row reaches costs neither time nor memory (see Classifier.warm_up). share:
    share weights with sessions of this process on the same bundle, device and threads. device: None is cpu
    for engine ort, cuda for trt. provider: what ONNX Runtime uses on a GPU, "cuda" or "tensorrt" (then the
    device is cuda). cuda_graphs: on a GPU, launch a step as one CUDA graph from the second run of a shape on.
    exit_kv: for generated text, what the cache holds of a token after its exit. "deferred": the token waits
    and runs the segments when a later token goes deeper, so that the cache is that of full depth;
    "propagate": keys and values are computed from the hidden state of its exit. long_texts: "cut" reads the
    beginning of a text that is longer than the network reads (its answer is marked truncated); "windows"
    walks overlapping windows and joins their answers (see Answer). Raises BundleNotFound,
    BadBundle, EngineUnavailable, and BadSetting for options that are unknown or contradict each other.
    """
    size = checked_batch_size(batch_size)
    if long_texts not in LONG_TEXTS:
        raise BadSetting(f"long_texts {long_texts!r}: choose one of {', '.join(LONG_TEXTS)}")
    options = EngineOptions(
        engine=engine,
        device=device,
        provider=provider,
        threads=threads,
        global_pool=global_pool,
        lazy=lazy,
        share=share,
        cuda_graphs=cuda_graphs,
        exit_kv=exit_kv,
    )
    bundle = open_bundle(path)
    spec, variant = resolve_rule(
        bundle.manifest, rule=rule, threshold=threshold, point=point, variant=variant
    )
    bound_rule = bind_for_bundle(bundle, spec, exit_kv)  # before graphs are opened, which takes seconds
    if long_texts != "cut" and bundle.manifest.task != "text-classification":
        raise BadSetting(f"long_texts {long_texts}: {path} does not classify texts, so it has no windows")
    if bundle.manifest.task == GENERATION:
        return _open_generator(bundle, options, bound_rule, variant)
    return _open_classifier(bundle, options, bound_rule, variant, size, long_texts)


def load_classifier(path: str | PathLike[str] = "bundle/", **options: object) -> Classifier:
    """Open a bundle that classifies, with the options of load(); raises BadSetting for a decoder's bundle."""
    _check_task(path, generates=False)
    return cast(Classifier, cast(Callable[..., object], load)(path, **options))


def load_generator(path: str | PathLike[str] = "bundle/", **options: object) -> TextGenerator:
    """Open a decoder's bundle, with the options of load(); raises BadSetting for a bundle that classifies."""
    _check_task(path, generates=True)
    return cast("TextGenerator", cast(Callable[..., object], load)(path, **options))


def _check_task(path: str | PathLike[str], *, generates: bool) -> None:
    if (open_bundle(path).manifest.task == GENERATION) != generates:
        kind = "classifies" if generates else "generates text"
        raise BadSetting(f"{path}: this bundle {kind}; open it with load()")


def _open_generator(bundle: Bundle, options: EngineOptions, rule: Rule, variant: str) -> TextGenerator:
    from offramp.runtime.generator import TextGenerator  # here: a classifier does not need it

    for name, value, only in (
        ("engine", options.engine, "ort"),
        ("device", options.real_device, "cpu"),
    ):
        if value != only:
            raise BadSetting(f"{name} {value}: bundles that generate text run on {name} {only} alone")
    engine = cast("Engine[TokenSequence]", open_engine(bundle, variant, options))
    return _or_close(engine, lambda: TextGenerator(bundle, engine, rule, variant))


def _open_classifier(
    bundle: Bundle, options: EngineOptions, rule: Rule, variant: str, batch_size: int, long_texts: str
) -> Classifier:
    # Reading a vocabulary takes time, during which the engine mostly reads files.
    reader = BackgroundTask(partial(open_reader, long_texts=long_texts), bundle)
    try:
        engine = open_engine(bundle, variant, options)
    finally:
        reader.join()

    def session() -> Classifier:
        if batch_size > engine.max_rows:
            raise BadSetting(
                f"batch size {batch_size}: engine {options.engine} walks at most {engine.max_rows} rows "
                "together"
            )
        return Classifier(bundle, engine, reader.result(), rule, variant, batch_size)

    return _or_close(engine, session)


def _or_close(engine: Engine[S], make_session: Callable[[], T]) -> T:
    """Make the session; on an error, close the engine and raise the error."""
    try:
        return make_session()
    except BaseException:
        engine.close()
        raise
