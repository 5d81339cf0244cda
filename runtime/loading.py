"""load(), which opens a bundle's folder as a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import (
    CLASSIFICATION,
    EMBEDDING,
    GENERATION,
    MULTI_LABEL,
    REGRESSION,
    TOKENS,
    RuleSpec,
    TextInput,
)
from offramp.runtime.engines.base import Engine, EngineOptions, S, open_engine
from offramp.runtime.engines.graphs import free_unused_memory
from offramp.runtime.errors import BadSetting
from offramp.runtime.hub.resolve import resolve_bundle
from offramp.runtime.inputs.text import LONG_TEXTS, open_reader
from offramp.runtime.pipeline import BackgroundTask
from offramp.runtime.row_session import RowAnswer, RowSession, checked_batch_size
from offramp.runtime.rules.base import Rule
from offramp.runtime.rules.resolve import bind_for_bundle, resolve_rule

if TYPE_CHECKING:
    from offramp.runtime.audit import AuditPlan
    from offramp.runtime.budget import Budget
    from offramp.runtime.classifier import Classifier
    from offramp.runtime.generator import TextGenerator
    from offramp.runtime.multi_label import MultiLabelClassifier
    from offramp.runtime.sequence import TokenSequence
    from offramp.runtime.token_classifier import TokenClassifier
    from offramp.runtime.values import Embedder, Regressor

    AnyRowSession = Classifier | MultiLabelClassifier | TokenClassifier | Regressor | Embedder

T = TypeVar("T")
BATCH_SIZE = 32


class SessionKind(NamedTuple):
    """A kind of session that gives one answer for each item: its module, its class, and what it does."""

    module: str
    name: str
    does: str


# by kind of task; a module is imported when a session of it is opened, so that others start sooner
ROW_SESSIONS: Mapping[str, SessionKind] = {
    CLASSIFICATION: SessionKind("classifier", "Classifier", "classifies"),
    MULTI_LABEL: SessionKind("multi_label", "MultiLabelClassifier", "gives several labels"),
    TOKENS: SessionKind("token_classifier", "TokenClassifier", "labels words"),
    REGRESSION: SessionKind("values", "Regressor", "gives a number"),
    EMBEDDING: SessionKind("values", "Embedder", "embeds texts"),
}


def load(
    path: str | PathLike[str] = "bundle/",
    *,
    engine: str = "ort",
    device: str | None = None,
    variant: str | None = None,
    threads: int | None = None,
    global_pool: bool = False,
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
    require_signature: str | PathLike[str] | None = None,
    budget_ms: float | None = None,
    budget_depth: float | None = None,
    budget_of: str | None = None,
    budget_window: int | None = None,
    max_risk: float | None = None,
    audit: float | None = None,
    audit_limit: float | None = None,
    on_drift: str | None = None,
    seed: int = 0,
) -> AnyRowSession | TextGenerator:
    """Open a bundle as a session: that of the bundle's task.

    A Classifier, MultiLabelClassifier, TokenClassifier, Regressor or Embedder, or a TextGenerator for a
    decoder's bundle. path: the bundle's folder, or "hub:user/name" or "hub:user/name@revision" for a bundle
    on a model hub, which is pulled into a cache (docs/hub.md).

    Options that are not given come from the bundle's manifest. rule: a rule's name or a RuleSpec. threshold:
    the rule's main parameter (rule fixed: the exit; patience: the number of agreements). point: an operating
    point of the manifest, which sets rule and variant. threads: None is one for each core that the process
    may use (affinity, CPU limits of containers). global_pool: run all segments on one thread pool of the
    whole process, a few per cent faster; from then on ONNX Runtime refuses sessions of the application that
    do not set use_per_session_threads = False, and the session does not survive a fork (docs/processes.md).
    With False nothing else in the process changes; a pool that the process has already is used. batch_size:
    most rows that are walked together. lazy: open a segment when a row first reaches it; the first answers
    are slower, and a segment that no row reaches costs neither time nor memory (see RowSession.warm_up).
    share: share weights with sessions of this process on the same bundle, device and threads. device: None is
    cpu for engine ort, cuda for trt. provider: what ONNX Runtime uses on a GPU, "cuda" or "tensorrt" (then
    the device is cuda). cuda_graphs: on a GPU, launch a step as one CUDA graph from the second run of a shape
    on. exit_kv: for generated text, what the cache holds of a token after its exit. "deferred": the token
    waits and runs the segments when a later token goes deeper, so that the cache is that of full depth;
    "propagate": keys and values are computed from the hidden state of its exit (rule select always does so).
    long_texts: "cut" reads the beginning of a text that is longer than the network reads (its answer is
    marked truncated); "windows" walks overlapping windows and joins their answers (see the answer of the
    task). require_signature: file of the public key that must have signed the bundle, else BadSignature.
    budget_ms, budget_depth: milliseconds of an answer, or blocks run as a share of all, that a controller
    holds by moving among the points of one rule and variant (docs/budgets.md). budget_of: "mean" (the
    default) or "p95". budget_window: rows over
    which it is held, 1000. max_risk: only points that guarantee a risk of at most this are used. audit: share
    of the rows that are walked to the end in the background, to see whether answers still agree with full
    depth. audit_limit: the disagreement that is allowed; None for that of the point. on_drift: "warn" (the
    default), or "full-depth": walk all rows to the end once the limit was passed. seed: of the rows that are
    drawn for both. See budget_report and audit_report of RowSession. Warns with BudgetExceeded and
    DriftWarning, once each. Raises BundleNotFound, BadBundle, EngineUnavailable, and BadSetting for options
    that are unknown or contradict each other.
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
    of_budget = _given(
        ms=budget_ms, depth=budget_depth, statistic=budget_of, window=budget_window, max_risk=max_risk
    )
    of_audit = _given(share=audit, limit=audit_limit, on_drift=on_drift)
    bundle = open_bundle(resolve_bundle(path), require_signature)
    if (of_budget or of_audit) and bundle.manifest.kind == GENERATION:
        name = "a budget" if of_budget else "an audit"
        raise BadSetting(f"{path} generates text: {name} is for bundles that give one answer for each row")
    if of_budget and (point is not None or threshold is not None):
        name = "threshold" if point is None else "point"
        raise BadSetting(f"{name}: a budget moves among points; leave it out, or name rule and variant")
    spec, variant = resolve_rule(
        bundle.manifest, rule=rule, threshold=threshold, point=point, variant=variant
    )
    budget, plan = None, None
    if of_budget:
        from offramp.runtime.budget import BudgetOptions, open_budget  # here: others do not need it

        budget = open_budget(bundle.manifest, spec, variant, BudgetOptions(**of_budget, seed=seed))
        spec = budget.points[0].rule
    if of_audit:
        from offramp.runtime.audit import AuditOptions, plan_audit  # here: others do not need it

        limits = None if budget is None else [point.limit for point in budget.points]
        plan = plan_audit(bundle.manifest, spec, variant, AuditOptions(**of_audit, seed=seed), limits)
    bound_rule = bind_for_bundle(bundle, spec, exit_kv)  # before graphs are opened, which takes seconds
    generates = bundle.manifest.kind == GENERATION
    if long_texts != "cut" and (generates or not isinstance(bundle.manifest.input, TextInput)):
        what = "generates text" if generates else "reads images"
        raise BadSetting(f"long_texts {long_texts}: {path} {what}, so it has no windows")
    if generates:
        return _open_generator(bundle, options, bound_rule, variant)
    watching = {"budget": budget, "audit": plan}
    return _open_row_session(bundle, options, bound_rule, variant, size, long_texts, watching)


def load_classifier(path: str | PathLike[str] = "bundle/", **options: object) -> Classifier:
    """Open a bundle that classifies, with the options of load(); raises BadSetting for other tasks."""
    return cast("Classifier", _load_kind(path, (CLASSIFICATION,), options))


def load_row_session(path: str | PathLike[str] = "bundle/", **options: object) -> RowSession[RowAnswer]:
    """Open a bundle that gives one answer for each item, with the options of load(), see RowSession.

    Raises BadSetting for a decoder's bundle.
    """
    return cast("RowSession[RowAnswer]", _load_kind(path, tuple(ROW_SESSIONS), options))


def load_generator(path: str | PathLike[str] = "bundle/", **options: object) -> TextGenerator:
    """Open a decoder's bundle, with the options of load(); raises BadSetting for other tasks."""
    return cast("TextGenerator", _load_kind(path, (GENERATION,), options))


def _load_kind(path: str | PathLike[str], kinds: tuple[str, ...], options: Mapping[str, object]) -> object:
    """Open a bundle whose task is of one of these kinds; raises BadSetting for others."""
    key, folder = cast("str | None", options.get("require_signature")), resolve_bundle(path)
    kind = open_bundle(folder, key).manifest.kind
    if kind not in kinds:
        does = ROW_SESSIONS[kind].does if kind in ROW_SESSIONS else "generates text"
        raise BadSetting(f"{path}: this bundle {does}; open it with load()")
    return cast(Callable[..., object], load)(folder, **options)


def _open_generator(bundle: Bundle, options: EngineOptions, rule: Rule, variant: str) -> TextGenerator:
    from offramp.runtime.generator import TextGenerator  # here: other sessions do not need them
    from offramp.runtime.inputs.text import open_tokenizer

    for name, value, only in (
        ("engine", options.engine, "ort"),
        ("device", options.real_device, "cpu"),
    ):
        if value != only:
            raise BadSetting(f"{name} {value}: bundles that generate text run on {name} {only} alone")
    if rule.spec.name == "select":  # its tokens leave keys and values in the segments that they skip
        options = replace(options, exit_kv="propagate")
    # Before graphs are opened: they take the memory that reading a tokenizer leaves free.
    assert isinstance(bundle.manifest.input, TextInput)
    tokenizer = open_tokenizer(bundle, bundle.manifest.input)
    engine = cast("Engine[TokenSequence]", open_engine(bundle, variant, options))
    opened = _or_close(engine, lambda: TextGenerator(bundle, engine, tokenizer, rule, variant))
    free_unused_memory()
    return opened


def _open_row_session(
    bundle: Bundle,
    options: EngineOptions,
    rule: Rule,
    variant: str,
    batch_size: int,
    long_texts: str,
    watching: Mapping[str, Budget | AuditPlan | None],
) -> AnyRowSession:
    kind = ROW_SESSIONS[bundle.manifest.kind]
    # Reading a vocabulary takes time, during which the engine mostly reads files.
    reader = BackgroundTask(partial(open_reader, long_texts=long_texts), bundle)
    try:
        engine = open_engine(bundle, variant, options)
    finally:
        reader.join()

    def session() -> AnyRowSession:
        if batch_size > engine.max_rows:
            raise BadSetting(
                f"batch size {batch_size}: engine {options.engine} walks at most {engine.max_rows} rows "
                "together"
            )
        make: Callable[..., AnyRowSession] = getattr(
            import_module(f"offramp.runtime.{kind.module}"), kind.name
        )
        if watching["audit"] is not None and not options.lazy:  # audits walk the default variant
            engine.prepare(0, range(len(bundle.manifest.segments)))
        return make(bundle, engine, reader.result(), rule, variant, batch_size, **watching)

    opened = _or_close(engine, session)
    # Reading a tokenizer of 30,000 entries leaves some 50 MB of freed memory behind, again in each further
    # thread that opens sessions, since the C library keeps freed memory for each thread (measured).
    free_unused_memory()
    return opened


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def _or_close(engine: Engine[S], make_session: Callable[[], T]) -> T:
    """Make the session; on an error, close the engine and raise the error."""
    try:
        return make_session()
    except BaseException:
        engine.close()
        raise
