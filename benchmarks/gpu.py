"""What early exit costs and saves on an NVIDIA GPU, beside one graph and torch on the same GPU.

    python benchmarks/gpu.py prepare work/                    # on any machine: a random network, exported
    python benchmarks/gpu.py run work/ --json gpu.json        # on the one with the GPU: about 8 minutes
    python benchmarks/gpu.py run work/ --device cpu --turns 5 # the same without a GPU, to try the script

Contenders take turns in one process, ratios are formed turn by turn: the walk through every segment (an
exit after each block, and after every third) on ONNX Runtime's CUDA kernels and, where it is there, TensorRT;
plain and with CUDA graphs; the same network without exits as one graph on ONNX Runtime; and on torch. Inputs
come from the host and answers go back to it, for everybody. What cannot be run is named with its reason and
never replaced.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from offramp.benchmarks.clock import Timings, interleave
from offramp.benchmarks.gpu_rivals import one_graph, torch_network
from offramp.runtime import OfframpError, Session, load
from offramp.runtime.engines.device import DeviceEngine
from offramp.runtime.tuning.report import machine

CUTS = {"each": "each", "thirds": "every 3"}
OVERHEAD, REALISED = 1.10, 0.85  # what is asked of ONNX Runtime at batch 1 in fp16, 12 x 768
Run = Callable[[], object]


@click.group()
def main() -> None:
    """What early exit costs and saves on an NVIDIA GPU; see the docstring of this file."""


@main.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--blocks", default=12, show_default=True)
@click.option("--width", default=768, show_default=True)
def prepare(work: Path, blocks: int, width: int) -> None:
    """Export a BERT of random weights (times do not depend on them) in fp32 and fp16, cut in two ways."""
    from offramp.benchmarks.overhead import random_checkpoint

    work.mkdir(parents=True, exist_ok=True)
    program, checkpoint = (
        str(Path(sys.executable).parent / "ee-split"),
        random_checkpoint(work, blocks, width),
    )
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
@click.option("--turns", default=100, show_default=True, help="Turns of each contender, at most.")
@click.option("--budget", default=360.0, show_default=True, help="Seconds for all turns together.")
@click.option(
    "--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the figures."
)
def run(
    work: Path, device: str, rows: str, lengths: str, turns: int, budget: float, file: Path | None
) -> None:
    """Measure; exit code 2 where the device cannot be had."""
    sizes = [(int(n), int(length)) for n in rows.split(",") for length in lengths.split(",")]
    found: list[dict[str, Any]] = []
    missing: dict[str, str] = {}
    facts: dict[str, str] = {}
    for variant in ("fp32", "fp16"):
        with ExitStack() as stack:
            try:
                sessions = dict(_sessions(work, device, variant, stack, missing))
            except OfframpError as problem:
                click.echo(f"benchmarks/gpu.py: {problem}; without a GPU: --device cpu", err=True)
                sys.exit(2)
            for name, session in sessions.items():
                facts |= {f"{name.split()[0]} {key}": value for key, value in session.engine.facts.items()}
            share = budget / 2 / len(sizes)
            for size in sizes:
                click.echo(f"{variant}, {size[0]} x {size[1]}", err=True)
                row = {"variant": variant, "rows": size[0], "tokens": size[1]}
                found.append(row | _measure(work, device, sessions, variant, size, turns, share, missing))
    result: dict[str, Any] = {"command": " ".join(["benchmarks/gpu.py", *sys.argv[1:]])}
    result |= {"machine": {**machine(), **facts}, "left out": missing, "measured": found}
    result["targets"] = _targets(found) if device == "cuda" else {}
    _show(result)
    if file is not None:
        beside = file.with_name(f".{file.name}.new")
        beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, file)


def _sessions(
    work: Path, device: str, variant: str, stack: ExitStack, missing: dict[str, str]
) -> Iterator[tuple[str, Session]]:
    """Name -> session: engine, cut, and "graphs" where CUDA graphs are on. Raises where ONNX Runtime is not
    there on the device; TensorRT may be missing.
    """
    wishes: dict[str, Any] = {"rule": "never", "variant": variant, "share": False, "batch_size": 32}
    for cut in CUTS:
        yield f"ort {cut}", stack.enter_context(load(work / cut, device=device, **wishes))
        if device == "cuda":
            captured = load(work / cut, device=device, cuda_graphs=True, **wishes)
            yield f"ort {cut} graphs", stack.enter_context(captured)
    if device == "cuda":
        for name in ("trt thirds", "trt thirds graphs"):
            given: dict[str, Any] = {"engine": "trt", "cuda_graphs": name.endswith("graphs")}
            try:
                yield name, stack.enter_context(load(work / "thirds", **given, **wishes))
            except OfframpError as problem:
                missing[name] = str(problem)


def _measure(
    work: Path,
    device: str,
    sessions: dict[str, Session],
    variant: str,
    size: tuple[int, int],
    turns: int,
    seconds: float,
    missing: dict[str, str],
) -> dict[str, Any]:
    """Every figure at one size: ratios to one graph, shares by exit, what waiting and gathering cost."""
    given = _inputs(*size)
    contenders: dict[str, Run] = {name: _walk(session, given) for name, session in sessions.items()}
    contenders["one graph"] = one_graph(work, variant, device, given)
    try:
        contenders["torch"] = torch_network(work, variant, device, given)
    except Exception as problem:  # whatever torch is not there or too old for
        missing["torch"] = f"{type(problem).__name__}: {problem}"
    for name, session in sessions.items():
        depth = len(session.manifest.segments)
        if not name.endswith("graphs"):
            for exit in sorted({depth // 4, depth // 2} - {0}):
                contenders[f"{name} to exit {exit}"] = _walk(session, given, exit)
            if isinstance(session.engine, DeviceEngine):
                contenders[f"{name}, waiting once"] = _waiting_once(session, given)
    for contender in contenders.values():  # shapes are bound and captured in the first three runs
        for _ in range(3):
            contender()
    started = time.perf_counter()
    for contender in contenders.values():
        contender()
    turn = time.perf_counter() - started
    timings = interleave(contenders, max(3, min(turns, int(seconds / turn))))
    return _figures(timings, sessions, size) | {"gather half of the rows ms": _gathering(sessions, given)}


def _figures(timings: Timings, sessions: dict[str, Session], size: tuple[int, int]) -> dict[str, Any]:
    found: dict[str, Any] = {"one graph ms": _short(1e3 * timings.median("one graph"))}
    if "torch" in timings.seconds:
        found["torch / one graph"] = _short(timings.ratio("torch", "one graph"))
    for name, session in sessions.items():
        told: dict[str, Any] = {"full / one graph": _short(timings.ratio(name, "one graph"))}
        if f"{name} graphs" in sessions:
            told["plain / CUDA graphs"] = _short(timings.ratio(name, f"{name} graphs"))
        macs = np.array([stage.macs.of(size[1]) for stage in session.manifest.segments], float).cumsum()
        macs += session.manifest.stem.macs.of(size[1])
        for exit in range(1, len(macs)):
            if (key := f"{name} to exit {exit}") in timings.seconds:
                share = timings.ratio(key, "one graph")
                saved = 1 - macs[exit - 1] / macs[-1]
                told[f"exit {exit}"] = {"time / one graph": _short(share), "MACs saved": _short(saved)}
                told[f"exit {exit}"]["realised"] = _short((1 - share) / saved)
        if (key := f"{name}, waiting once") in timings.seconds:
            waits = len(macs) - 1
            more = (timings.seconds[name] - timings.seconds[key]) / max(1, waits)
            told["a wait costs us"] = _short(1e6 * float(np.median(more)))
        found[name] = told
    return found


def _targets(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether ONNX Runtime does at batch 1 in fp16 what is asked of it, by cut: the worst of all lengths."""
    rows = [row for row in found if row["variant"] == "fp16" and row["rows"] == 1]
    told = {}
    for cut in CUTS:
        overhead = max((row[f"ort {cut}"]["full / one graph"] for row in rows), default=float("nan"))
        exits = [at for row in rows for name, at in row[f"ort {cut}"].items() if name.startswith("exit ")]
        realised = min((at["realised"] for at in exits), default=float("nan"))
        holds = overhead <= OVERHEAD and realised >= REALISED
        told[cut] = {"full / one graph": overhead, "realised": realised, "holds": holds}
    return told | {"asked": {"full / one graph": OVERHEAD, "realised": REALISED}}


def _inputs(rows: int, length: int) -> dict[str, Any]:
    ids = np.random.default_rng(length).integers(5, 1000, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def _walk(session: Session, given: dict[str, Any], exits: int | None = None) -> Run:
    """All rows to that exit (None: the last), by the engine's own steps."""
    engine, number = session.engine, session.manifest.variants.index(session.variant)
    steps = range(exits or len(session.manifest.segments))

    def run() -> None:
        state = engine.begin(given)
        for segment in steps:
            engine.step(segment, number, state)
        engine.drop(state)

    return run


def _waiting_once(session: Session, given: dict[str, Any]) -> Run:
    """A full walk that reads nothing before its end: what it saves is the price of deciding at every exit."""
    walk, engine = _walk(session, given), session.engine
    assert isinstance(engine, DeviceEngine)
    cuda = engine._cuda

    def run() -> None:
        with _without_waiting(cuda):
            walk()
        cuda.wait()

    return run


@contextmanager
def _without_waiting(cuda: Any) -> Iterator[None]:
    cuda.wait = lambda: None
    try:
        yield
    finally:
        del cuda.wait


def _gathering(sessions: dict[str, Session], given: dict[str, Any]) -> dict[str, float]:
    """Milliseconds to go on with every other row, the worst case: as many stretches as rows."""
    found = {}
    for name, session in sessions.items():
        engine, state = session.engine, session.engine.begin(given)
        wait = engine._cuda.wait if isinstance(engine, DeviceEngine) else lambda: None
        if state.rows > 1:
            rows, taken = np.arange(0, state.rows, 2), []
            for _ in range(20):
                wait()
                started = time.perf_counter()
                engine.drop(engine.take(state, rows))
                wait()
                taken.append(time.perf_counter() - started)
            found[name] = _short(1e3 * float(np.median(taken)))
        engine.drop(state)
    return found


def _show(result: dict[str, Any]) -> None:
    for row in result["measured"]:
        click.echo(f"{row['variant']}, {row['rows']} x {row['tokens']}: one graph {row['one graph ms']} ms")
        for name, told in row.items():
            if isinstance(told, dict) and "full / one graph" in told:
                click.echo(f"  {name:20} " + ", ".join(f"{key} {value}" for key, value in told.items()))
    for name, reason in result["left out"].items():
        click.echo(f"left out: {name}: {reason}")
    for name, told in result["targets"].items():
        click.echo(f"target {name}: {told}")


def _short(value: float) -> float:
    return float(f"{float(value):.4g}")


if __name__ == "__main__":
    main()
