"""The training loop: phases over row numbers, on accelerate; it can be killed at any time and resumed."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from offramp.models.own_head import OWN_HEAD_LAYERS
from offramp.runtime.progress import progress
from offramp.training.batches import shuffled_batches
from offramp.training.checkpoint import BadCheckpoint, read_json, write_json
from offramp.training.pretrained import first_line

# (model, row numbers [batch]) -> loss, figures for the log; the model is the network, or accelerate's wrapper
# of it if several processes train
BatchLoss = Callable[[nn.Module, np.ndarray], tuple[Tensor, dict[str, float]]]
N = TypeVar("N", bound=nn.Module)
OPTIMIZERS = ("adamw", "sgd")
DECAYS = ("linear", "cosine")
MOMENTUM = 0.9  # of sgd


@dataclass(frozen=True)
class Phase:
    """A part of a training with one optimizer and one loss.

    trains: prefixes of the names of trained parameters; all others are frozen during the phase.
    lengths: tokens of every row [rows], for batches of similar length; zeros if length does not matter.
    heads_lr: learning rate of parts without pretrained weights (exits, policies) that are trained together
    with a pretrained backbone; None: lr. policies_lr: that of policies alone; None: heads_lr.
    shared: whether processes share the work by gradient averaging; a phase over cached features is too short
    for that.
    optimizer: one of OPTIMIZERS; sgd has momentum 0.9. warmup: share of the steps in which learning rates
    rise. decay: one of DECAYS, the curve by which they then fall to `last_share` of their peak.
    """

    name: str
    trains: tuple[str, ...]
    lengths: np.ndarray
    loss: BatchLoss
    epochs: int
    batch_size: int
    lr: float
    heads_lr: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    shared: bool = True
    policies_lr: float | None = None
    optimizer: str = "adamw"
    decay: str = "linear"
    last_share: float = 0.0

    def __post_init__(self) -> None:
        for value, known in ((self.optimizer, OPTIMIZERS), (self.decay, DECAYS)):
            if value not in known:
                raise ValueError(f"phase {self.name}: {value!r}; choose one of {', '.join(known)}")


class Run(Generic[N]):
    """A training run with a folder that holds log.jsonl, stored tensors, and the state to resume from.

    The state is written to a sibling file and renamed, so a kill at any time leaves the last complete state.
    Batches and learning rates are functions of (seed, phase, step), and random generators are part of the
    state: resumed on one CPU thread, a run ends with the weights of an uninterrupted one.
    """

    def __init__(
        self,
        network: N,
        folder: Path,
        *,
        seed: int,
        precision: str = "no",
        save_every: float = 120.0,
    ) -> None:
        options = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[options])
        self.network: N = network.to(self.accelerator.device)
        self.folder, self.seed, self.save_every = folder, seed, save_every
        folder.mkdir(parents=True, exist_ok=True)
        self.phases_begun = 0
        self.position = {"phase": 0, "step": 0}
        self._optimizer_state: dict[str, Tensor] = {}
        if (folder / "state.json").is_file():
            self._read_state()

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes files."""
        return bool(self.accelerator.is_main_process)

    @property
    def between_phases(self) -> bool:
        """Whether the next phase has not begun.

        Weights may be changed outside of a phase only then, or a resumed run would change them a second time.
        """
        return self.position == {"phase": self.phases_begun, "step": 0}

    def log(self, **figures: Any) -> None:
        """Append one line with the time and these figures to log.jsonl."""
        if self.is_main_process:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"time": round(time.time(), 1), **figures}) + "\n")

    def compute_once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a tensor once and store it in the run's folder; after a resume it is read from there.

        For values that depend on the present weights and must not be computed again later.
        """
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            value = compute().contiguous().cpu()
            if self.is_main_process:
                temporary = file.with_suffix(".writing")
                save_file({name: value}, temporary)
                os.replace(temporary, file)
            self.accelerator.wait_for_everyone()
            return value
        return load_file(file)[name]

    def skip_finished_phase(self) -> bool:
        """Whether the next phase was finished before a resume; if so, it is counted as done.

        The recipe can then omit the preparation of that phase.
        """
        finished = self.phases_begun < self.position["phase"]
        self.phases_begun += int(finished)
        return finished

    def fit(self, phase: Phase) -> None:
        """Train through a phase, or the rest of it after a resume; a finished phase is skipped."""
        if self.skip_finished_phase():
            return
        number = self.phases_begun
        self.phases_begun += 1
        trained = self._freeze_all_but(phase.trains)
        world = self.accelerator.num_processes if phase.shared else 1
        rank = self.accelerator.process_index if phase.shared else 0
        per_epoch = [
            shuffled_batches(phase.lengths, phase.batch_size, self.seed * 1000 + number, epoch)
            for epoch in range(phase.epochs)
        ]
        batches = [batch for epoch in per_epoch for batch in epoch]
        total = len(batches) // world
        optimizer = _make_optimizer(trained, phase)
        model: nn.Module = self.network
        if world > 1:
            model, optimizer = self.accelerator.prepare(self.network, optimizer)
        if self.position["step"] == 0:
            torch.manual_seed(self.seed * 1000 + number)
        else:
            _restore_optimizer(optimizer, trained, self._optimizer_state)
        self._optimizer_state = {}
        self.network.train()
        last_save, smooth_loss = time.monotonic(), None
        done, shown = self.position["step"], self.is_main_process
        with progress(phase.name, total, done=done, shown=shown) as bar:
            for step in range(done, total):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * _schedule(step, total, phase)
                with self.accelerator.autocast():
                    loss, figures = phase.loss(model, batches[step * world + rank])
                self.accelerator.backward(loss)
                torch.nn.utils.clip_grad_norm_([p for _, p in trained], phase.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self.position["step"] = step + 1
                value = float(loss.detach())
                smooth_loss = value if smooth_loss is None else 0.98 * smooth_loss + 0.02 * value
                if step % 20 == 0 or step + 1 == total:
                    bar.note = f"loss {smooth_loss:.4f}"
                    self.log(phase=phase.name, step=step + 1, of=total, loss=round(value, 6), **figures)
                if time.monotonic() - last_save > self.save_every and step + 1 < total:
                    self._write_state(optimizer, trained)
                    last_save = time.monotonic()
                bar.advance()
        self.network.eval()
        for parameter in self.network.parameters():
            parameter.requires_grad_(True)
        self.position = {"phase": number + 1, "step": 0}
        self._write_state(None, [])

    def _freeze_all_but(self, prefixes: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
        """Freeze all parameters but those whose names begin with a prefix; gives names and parameters of
        these.
        """
        trained = []
        for name, parameter in self.network.named_parameters():
            trains = name.startswith(tuple(prefixes))
            parameter.requires_grad_(trains)
            if trains:
                trained.append((name, parameter))
        if not trained:
            raise ValueError(f"no parameter of the network begins with {', '.join(prefixes)}")
        return trained

    def _write_state(
        self, optimizer: torch.optim.Optimizer | None, trained: list[tuple[str, nn.Parameter]]
    ) -> None:
        if not self.is_main_process:
            return
        tensors = {f"weights/{name}": tensor for name, tensor in self.network.state_dict().items()}
        if optimizer is not None:
            for name, parameter in trained:
                for key, value in optimizer.state[parameter].items():
                    tensors[f"optimizer/{key}/{name}"] = value
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        # Two files need two renames. The tensor file's name contains the position, so state.json always names
        # a complete file.
        name = f"state-{self.position['phase']}-{self.position['step']}.safetensors"
        save_file(
            {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()},
            self.folder / (name + ".writing"),
        )
        os.replace(self.folder / (name + ".writing"), self.folder / name)
        write_json(self.folder / "state.json", {**self.position, "tensors": name})
        for stale in self.folder.glob("state-*.safetensors*"):
            if stale.name != name:
                stale.unlink()

    def _read_state(self) -> None:
        state = read_json(self.folder / "state.json")
        try:
            tensors = load_file(self.folder / Path(str(state["tensors"])).name)
            self.network.load_state_dict(_with_prefix("weights/", tensors))
            self._optimizer_state = _with_prefix("optimizer/", tensors)
            torch.set_rng_state(tensors["random/cpu"])
            if "random/cuda" in tensors and torch.cuda.is_available():
                torch.cuda.set_rng_state(tensors["random/cuda"])
            self.position = {"phase": int(state["phase"]), "step": int(state["step"])}
        except (SafetensorError, OSError, LookupError, RuntimeError, TypeError, ValueError) as problem:
            raise BadCheckpoint(
                f"{self.folder / 'state.json'}: the run cannot go on from this state: "
                f"{first_line(problem)}; remove {self.folder} to begin again"
            ) from problem


def best_precision() -> str:
    """The fastest precision on this machine: "bf16" if the hardware multiplies it natively, else "no" (fp32).

    Emulated bf16 is slower than fp32.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "bf16" if "amx_bf16" in flags or "avx512_bf16" in flags else "no"


def _schedule(step: int, total: int, phase: Phase) -> float:
    """Factor on the learning rate: linear warm-up over a share of the steps, then the phase's decay."""
    ramp = max(1, round(phase.warmup * total))
    if step < ramp:
        return (step + 1) / ramp
    remaining = (total - step) / max(1, total - ramp)
    if phase.decay == "cosine":
        remaining = (1 - math.cos(math.pi * remaining)) / 2
    return phase.last_share + (1 - phase.last_share) * remaining


def _make_optimizer(trained: list[tuple[str, nn.Parameter]], phase: Phase) -> torch.optim.Optimizer:
    groups = _parameter_groups(trained, phase)
    if phase.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=phase.lr, momentum=MOMENTUM)
    # One pass over the memory instead of ten: a step of AdamW on a CPU takes a quarter of the time.
    return torch.optim.AdamW(groups, lr=phase.lr, fused=True)


def _parameter_groups(trained: list[tuple[str, nn.Parameter]], phase: Phase) -> list[dict[str, Any]]:
    groups = []
    heads_lr = phase.lr if phase.heads_lr is None else phase.heads_lr
    policies_lr = heads_lr if phase.policies_lr is None else phase.policies_lr
    for part, peak in {"": phase.lr, "exits": heads_lr, "policies": policies_lr}.items():
        for matrices in (False, True):
            parameters = [p for name, p in trained if _part(name) == part and (p.ndim > 1) == matrices]
            # Biases and norms are one-dimensional; weight decay only harms them.
            decay = phase.weight_decay if matrices else 0.0
            if parameters:
                groups.append({"params": parameters, "peak": peak, "lr": peak, "weight_decay": decay})
    return groups


def _part(name: str) -> str:
    """The part of the network that a parameter belongs to: "exits", "policies" or, for all others, "".

    A model's own head is pretrained as its backbone is, so it does not count as an exit.
    """
    top, _, below = name.partition(".")
    if below.partition(".")[2].startswith(OWN_HEAD_LAYERS):
        return ""
    return top if top in ("exits", "policies") else ""


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, trained: list[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]
) -> None:
    parameters = dict(trained)
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        parameter = parameters[name]
        optimizer.state[parameter][slot] = value.to(parameter.device)


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, by their names without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
