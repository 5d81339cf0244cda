"""load(): from a bundle's folder to a session."""

from __future__ import annotations

from os import PathLike

from offramp.runtime import rules
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import GENERATION, RuleSpec
from offramp.runtime.classifier import Session, checked_size
from offramp.runtime.engines.base import open_engine
from offramp.runtime.errors import BadSetting
from offramp.runtime.inputs.text import reader_of
from offramp.runtime.pipeline import Task
from offramp.runtime.rules.resolve import choose


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
    batch_size: int = 32,
    lazy: bool = False,
    share: bool = True,
    provider: str | None = None,
    cuda_graphs: bool = False,
    cache: str = "deferred",
) -> Session:
    """Open a bundle folder as a session; what is not wished for is as the bundle's manifest says.

    rule: a rule's name or a RuleSpec. threshold: the rule's one number (rule fixed: the exit; patience: the
    streak). point: an operating point of the manifest, which sets rule and variant. threads: None is one a
    core.
    global_pool: run all segments on one pool of the whole process, the fastest; from then on ONNX Runtime
    opens no session of the application that does not set use_per_session_threads = False. With False (or
    threads=1) the process is left alone, for a few per cent.
    lazy: open a segment when a row first gets there; the first answers are slower, and what no row reaches
    costs neither time nor memory (see Session.warm_up). share: with sessions of this process on the same
    bundle, device and threads, share the weights.
    device: None is cpu for engine ort, cuda for trt. provider: what ONNX Runtime uses on a GPU, "cuda" or
    "tensorrt" (then the device is cuda). cuda_graphs: on a GPU, launch a step as one CUDA graph once its
    shape was seen.
    cache: of bundles that generate text, where tokens leave early: "deferred" has them wait and run later, in
    one go, when a token goes deeper, so that the cache is that of the full depth; "propagate" leaves keys and
    values there, made of the hidden state with which they left.
    Raises BundleNotFound, BadBundle, EngineUnavailable, and BadSetting for wishes unknown or
    contradicting each other.
    """
    size = checked_size(batch_size)
    bundle = open_bundle(path)
    if bundle.manifest.task == GENERATION:
        from offramp.runtime.generator import open_writer  # here: a classifier needs none of it

        return open_writer(
            bundle,
            {
                "engine": (engine, "ort"),
                "device": (device or "cpu", "cpu"),
                "provider": (provider, None),
                "cuda_graphs": (cuda_graphs, False),
            },
            variant=variant,
            rule=rule,
            threshold=threshold,
            point=point,
            cache=cache,
            threads=threads,
            global_pool=global_pool,
            share=share,
        )
    if cache != "deferred":
        raise BadSetting(f"cache {cache}: {path} classifies, it has no cache")
    spec, variant = choose(bundle.manifest, rule=rule, threshold=threshold, point=point, variant=variant)
    # A bad wish is named before seconds go into opening graphs.
    rules.bind(spec, len(bundle.manifest.segments), bundle.manifest.costs)
    encoder = Task(reader_of, bundle)  # a vocabulary takes its time, and the engine mostly reads and waits
    try:
        opened = open_engine(
            engine,
            bundle,
            device=device,
            variant=variant,
            threads=threads,
            global_pool=global_pool,
            lazy=lazy,
            share=share,
            provider=provider,
            cuda_graphs=cuda_graphs,
        )
    finally:
        encoder.join()
    try:
        most = getattr(opened, "most_rows", size)  # of engines that are built for a range of shapes
        if size > most:
            raise BadSetting(f"batch size {size}: engine {engine} walks at most {most} rows together")
        return Session(bundle, opened, encoder.result(), spec, variant, size)
    except BaseException:
        opened.close()
        raise
