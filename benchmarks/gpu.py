"""Measure the cost and gain of early exit on an NVIDIA GPU, beside one graph and torch on the same GPU.

    python benchmarks/gpu.py prepare work/                    # on any machine: a random network, exported
    python benchmarks/gpu.py run work/ --json gpu.json        # on the one with the GPU: about 8 minutes
    python benchmarks/gpu.py run work/ --device cpu --turns 5 # the same without a GPU, to try the script

Candidates take turns in one process, ratios are formed round by round: the walk through every segment (with
an exit after each block, and after every third) on ONNX Runtime's CUDA kernels and, where it is installed,
TensorRT; plain and with CUDA graphs; the same network without exits as one graph on ONNX Runtime; and on
torch. All of them read inputs from the host and copy answers back to it. A candidate that cannot run is
listed with the reason and never replaced.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.runtime import Classifier, OfframpError, load_classifier
from offramp.runtime.engines import ort_cuda, threads
from offramp.runtime.engines.cuda import Cuda, import_cuda_runtime
from offramp.runtime.engines.device import DeviceEngine
from offramp.runtime.engines.graphs import CPU
from offramp.runtime.rules import RuleSpec, bind
from offramp.runtime.tuning.report import machine_facts, write_atomically
from offramp.runtime.tuning.timing import time_in_turns, time_ratio
from offramp.runtime.walker import walk

CUTS = {"each": "each", "thirds": "every 3"}
OVERHEAD, REALISED = 1.10, 0.85  # targets for ONNX Runtime at batch 1 in fp16, 12 x 768
WARMUP = 3
ONE_GRAPH = "one graph"
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
Run = Callable[[], object]
Seconds = Mapping[str, list[float]]


@click.group(help=__doc__)
def main() -> None:
    """The command group of the GPU benchmark: prepare and run."""


@main.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--blocks", default=12, show_default=True)
@click.option("--width", default=768, show_default=True)
def prepare(work: Path, blocks: int, width: int) -> None:
    """Export a BERT of random weights, on which times do not depend, in fp32 and fp16, cut in two ways."""
    from offramp.benchmarks.overhead import random_checkpoint

    work.mkdir(parents=True, exist_ok=True)
    program = str(Path(sys.executable).parent / "ee-split")
    checkpoint = random_checkpoint(work, blocks, width)
    for name, cut in CUTS.items():
        words = ["--segments", cut, "--variants", "fp32,fp16", "--out", str(work / name), "--overwrite"]
        words += ["--monolith", str(work / "one.onnx")] if name == "each" else []
        subprocess.run([program, str(checkpoint), *words], check=True, stdout=subprocess.DEVNULL)
    click.echo(f"{work}: ready")


@main.command()
@click.argument("work", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--rows", default="1,32", show_default=True, help="Batch sizes.")
@click.option("--lengths", default="128,32", show_default=True, help="Tokens.")
@click.option("--turns", "rounds", default=100, show_default=True, help="Most rounds.")
@click.option("--budget", default=360.0, show_default=True, help="Seconds for all rounds together.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="File for the figures.")
def run(
    work: Path, device: str, rows: str, lengths: str, rounds: int, budget: float, file: Path | None
) -> None:
    """Measure all candidates and print the figures; exit code 2 if the device is not available."""
    sizes = [(int(n), int(length)) for n in rows.split(",") for length in lengths.split(",")]
    measured: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    facts: dict[str, str] = {}
    for variant in ("fp32", "fp16"):
        with ExitStack() as stack:
            try:
                sessions = dict(_open_sessions(work, device, variant, stack, left_out))
            except OfframpError as problem:
                click.echo(f"benchmarks/gpu.py: {problem}; without a GPU: --device cpu", err=True)
                sys.exit(2)
            for name, session in sessions.items():
                facts |= {f"{name.split()[0]} {key}": value for key, value in session.engine.facts.items()}
            seconds = budget / 2 / len(sizes)
            for size in sizes:
                click.echo(f"{variant}, {size[0]} x {size[1]}", err=True)
                row = {"variant": variant, "rows": size[0], "tokens": size[1]}
                row |= _measure(work, device, sessions, variant, size, rounds, seconds, left_out)
                measured.append(row)
    result: dict[str, Any] = {"command": " ".join(["benchmarks/gpu.py", *sys.argv[1:]])}
    result |= {"machine": {**machine_facts(), **facts}, "left out": left_out, "measured": measured}
    result["targets"] = _targets(measured) if device == "cuda" else {}
    _show(result)
    if file is not None:
        write_atomically(file, json.dumps(result, indent=1) + "\n")


def _open_sessions(
    work: Path, device: str, variant: str, stack: ExitStack, left_out: dict[str, str]
) -> Iterator[tuple[str, Classifier]]:
    """Open the sessions that are measured; yields their names and themselves.

    A name is engine and cut, with "graphs" if CUDA graphs are on. Raises if ONNX Runtime is not available on
    the device; a missing TensorRT is noted in `left_out`.
    """
    options: dict[str, Any] = {"rule": "never", "variant": variant, "share": False, "batch_size": 32}
    for cut in CUTS:
        yield (
            f"ort {cut}",
            stack.enter_context(load_classifier(work / cut, device=device, **options, global_pool=True)),
        )
        if device == "cuda":
            captured = load_classifier(
                work / cut, device=device, cuda_graphs=True, **options, global_pool=True
            )
            yield f"ort {cut} graphs", stack.enter_context(captured)
    if device == "cuda":
        for name in ("trt thirds", "trt thirds graphs"):
            more: dict[str, Any] = {"engine": "trt", "cuda_graphs": name.endswith("graphs")}
            try:
                yield (
                    name,
                    stack.enter_context(
                        load_classifier(work / "thirds", **more, **options, global_pool=True)
                    ),
                )
            except OfframpError as problem:
                left_out[name] = str(problem)


def _measure(
    work: Path,
    device: str,
    sessions: dict[str, Classifier],
    variant: str,
    size: tuple[int, int],
    rounds: int,
    seconds: float,
    left_out: dict[str, str],
) -> dict[str, Any]:
    """Measure all figures at one size: ratios to one graph, shares by exit, cost of waiting and gathering."""
    inputs = _inputs(*size)
    calls: dict[str, Run] = {name: _walk(session, inputs) for name, session in sessions.items()}
    calls[ONE_GRAPH] = single_graph_run(work, variant, device, inputs)
    try:
        calls["torch"] = torch_run(work, variant, device, inputs)
    except Exception as problem:  # torch may be missing, too old, or without the device
        left_out["torch"] = f"{type(problem).__name__}: {problem}"
    for name, session in sessions.items():
        depth = len(session.manifest.segments)
        if not name.endswith("graphs"):
            for exit in sorted({depth // 4, depth // 2} - {0}):
                calls[f"{name} to exit {exit}"] = _walk(session, inputs, exit)
            if isinstance(session.engine, DeviceEngine):
                calls[f"{name}, waiting once"] = _walk_waiting_once(session, inputs)
    for _ in range(WARMUP):  # shapes are bound and captured in the first three runs
        for call in calls.values():
            call()
    started = time.perf_counter()
    for call in calls.values():
        call()
    round_s = time.perf_counter() - started
    timings = time_in_turns(calls, max(3, min(rounds, int(seconds / round_s))), warmup=WARMUP)
    return _figures(timings, sessions, size) | {"gather half of the rows ms": _gather_ms(sessions, inputs)}


def _figures(seconds: Seconds, sessions: dict[str, Classifier], size: tuple[int, int]) -> dict[str, Any]:
    figures: dict[str, Any] = {"one graph ms": _rounded(1e3 * float(np.median(seconds[ONE_GRAPH])))}
    if "torch" in seconds:
        figures["torch / one graph"] = _ratio(seconds, "torch", ONE_GRAPH)
    for name, session in sessions.items():
        of_session: dict[str, Any] = {"full / one graph": _ratio(seconds, name, ONE_GRAPH)}
        if f"{name} graphs" in sessions:
            of_session["plain / CUDA graphs"] = _ratio(seconds, name, f"{name} graphs")
        macs = np.array([segment.macs.of(size[1]) for segment in session.manifest.segments], float).cumsum()
        macs += session.manifest.stem.macs.of(size[1])
        for exit in range(1, len(macs)):
            if (key := f"{name} to exit {exit}") in seconds:
                share, saved = _ratio(seconds, key, ONE_GRAPH), 1 - macs[exit - 1] / macs[-1]
                of_session[f"exit {exit}"] = {"time / one graph": share, "MACs saved": _rounded(saved)}
                of_session[f"exit {exit}"]["realised"] = _rounded((1 - share) / saved)
        if (key := f"{name}, waiting once") in seconds:
            waits = len(macs) - 1
            more = (np.array(seconds[name]) - np.array(seconds[key])) / max(1, waits)
            of_session["a wait costs us"] = _rounded(1e6 * float(np.median(more)))
        figures[name] = of_session
    return figures


def _targets(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """By cut, whether ONNX Runtime reaches the targets at batch 1 in fp16 at all lengths."""
    rows = [row for row in measured if row["variant"] == "fp16" and row["rows"] == 1]
    targets = {}
    for cut in CUTS:
        overhead = max((row[f"ort {cut}"]["full / one graph"] for row in rows), default=float("nan"))
        exits = [
            exit_figures
            for row in rows
            for name, exit_figures in row[f"ort {cut}"].items()
            if name.startswith("exit ")
        ]
        realised = min((exit["realised"] for exit in exits), default=float("nan"))
        holds = overhead <= OVERHEAD and realised >= REALISED
        targets[cut] = {"full / one graph": overhead, "realised": realised, "holds": holds}
    return targets | {"required": {"full / one graph": OVERHEAD, "realised": REALISED}}


def _inputs(rows: int, length: int) -> dict[str, Any]:
    ids = np.random.default_rng(length).integers(5, 1000, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _walk(session: Classifier, inputs: dict[str, Any], exit: int | None = None) -> Run:
    """A function that walks all rows to this exit (1-based), or to the last for None."""
    manifest, ids = session.manifest, np.arange(len(inputs["input_ids"]))
    segments = len(manifest.segments)
    rule = bind(RuleSpec("fixed", {"exit": float(exit or segments)}), segments)
    sizes = {"rows": len(ids), "segments": segments, "classes": len(manifest.labels), "limit": len(ids)}
    variant = manifest.variants.index(session.variant)
    return lambda: walk(session.engine, rule, [(ids, inputs)], variant=variant, **sizes)


def _walk_waiting_once(session: Classifier, inputs: dict[str, Any]) -> Run:
    """A function that walks all rows to the end and waits for the device only there.

    The time that it saves is the cost of deciding at every exit.
    """
    full_walk, engine = _walk(session, inputs), session.engine
    assert isinstance(engine, DeviceEngine)
    cuda = engine._cuda

    def run() -> None:
        with _without_waiting(cuda):
            full_walk()
        cuda.wait()

    return run


@contextmanager
def _without_waiting(cuda: Any) -> Iterator[None]:
    cuda.wait = lambda: None
    try:
        yield
    finally:
        del cuda.wait


def _gather_ms(sessions: dict[str, Classifier], inputs: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by session of taking every other row, the worst case, since no two rows are neighbours."""
    figures = {}
    for name, session in sessions.items():
        engine, state = session.engine, session.engine.begin(inputs)
        wait = engine._cuda.wait if isinstance(engine, DeviceEngine) else lambda: None
        if state.rows > 1:
            take = partial(_take_every_other, session, state, wait)
            figures[name] = _rounded(
                1e3 * float(np.median(time_in_turns({name: take}, 20, before=wait)[name]))
            )
        engine.drop(state)
    return figures


def _take_every_other(session: Classifier, state: Any, wait: Run) -> None:
    engine = session.engine
    engine.drop(engine.take(state, np.arange(0, state.rows, 2)))
    wait()


def single_graph_run(work: Path, variant: str, device: str, inputs: dict[str, Any]) -> Run:
    """A function that runs the network without exits as one graph, from inputs to logits on the host.

    On a GPU it is bound to device memory and enqueued on one stream, as the walk is, so that only the graphs
    differ; it waits for the logits.
    """
    import onnxruntime

    file = work / ("one.onnx" if variant == "fp32" else f"one_{variant}.onnx")
    options = onnxruntime.SessionOptions()
    threads.share_global_pool(options)
    if device == "cpu":
        session = onnxruntime.InferenceSession(file, options, providers=[CPU])
        known = {node.name: inputs[node.name] for node in session.get_inputs()}
        return lambda: session.run(None, known)
    cuda = Cuda(import_cuda_runtime())
    name = ort_cuda.NAMES["cuda"]
    session = onnxruntime.InferenceSession(
        file, options, providers=[(name, ort_cuda._cuda_options(cuda, False))], enable_fallback=0
    )
    if session.get_providers()[0] != name:
        raise RuntimeError(f"{name} was asked for, ONNX Runtime took {session.get_providers()[0]}")
    return _bound_run(onnxruntime, session, cuda, inputs)


def _bound_run(ort: Any, session: Any, cuda: Cuda, inputs: dict[str, Any]) -> Run:
    binding, uploads, memory = ort.IOBinding(session), [], []
    for node in session.get_inputs():
        array = inputs[node.name]
        host, place = cuda.pinned(array.nbytes), cuda.memory(array.nbytes)
        memory += [host, place]
        uploads.append((host.array.view(array.dtype).reshape(array.shape), array, place, host))
        binding.bind_input(node.name, ort_cuda.PLACE, 0, array.dtype.type, array.shape, place.pointer)
    (node,) = session.get_outputs()
    shape = (len(next(iter(inputs.values()))), node.shape[1])
    size = int(np.prod(shape)) * 4
    logits, place = cuda.pinned(size), cuda.memory(size)
    binding.bind_output(node.name, ort_cuda.PLACE, 0, np.float32, shape, place.pointer)
    entries = {"disable_synchronize_execution_providers": "1"}
    enqueue = ort_cuda.make_run(ort, session, binding, entries)  # type: ignore[attr-defined]  # doubles replace it there

    def run() -> None:
        for pinned, array, target, host in uploads:
            pinned[...] = array
            cuda.upload(target.pointer, host.pointer, array.nbytes)
        enqueue()
        cuda.download(logits.pointer, place.pointer, size)
        cuda.wait()

    run.memory = (memory, logits, place, session, cuda)  # type: ignore[attr-defined]  # the binding points to it
    return run


def torch_run(work: Path, variant: str, device: str, inputs: dict[str, Any]) -> Run:
    """A function that runs transformers' BERT of the same shape with a classifier, from inputs to logits.

    It runs eagerly, with torch's own fused attention.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig

    facts = json.loads((work / "ckpt" / "network.json").read_text(encoding="utf-8"))
    config = BertConfig(**_sizes(facts) | {"num_labels": 2})
    dtype = torch.float16 if variant == "fp16" else torch.float32
    model = (
        AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        .to(device, dtype)
        .eval()
    )

    @torch.inference_mode()
    def run() -> object:
        feed = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
        return model(**feed).logits.float().cpu().numpy()  # copies to the host, which waits

    return run


def _sizes(facts: Any) -> dict[str, Any]:
    """The sizes of the backbone, found in the nested dictionaries of network.json."""
    if isinstance(facts, dict):
        if "num_hidden_layers" in facts:
            return {name: facts[name] for name in SIZES}
        for value in facts.values():
            if sizes := _sizes(value):
                return sizes
    return {}


def _show(result: dict[str, Any]) -> None:
    for row in result["measured"]:
        click.echo(f"{row['variant']}, {row['rows']} x {row['tokens']}: one graph {row['one graph ms']} ms")
        for name, values in row.items():
            if isinstance(values, dict) and "full / one graph" in values:
                click.echo(f"  {name:20} " + ", ".join(f"{key} {value}" for key, value in values.items()))
    for name, reason in result["left out"].items():
        click.echo(f"left out: {name}: {reason}")
    for name, target in result["targets"].items():
        click.echo(f"target {name}: {target}")


def _ratio(seconds: Seconds, name: str, reference: str) -> float:
    return _rounded(time_ratio(seconds[name], seconds[reference])[0])


def _rounded(value: float) -> float:
    return float(f"{float(value):.4g}")


if __name__ == "__main__":
    main()
