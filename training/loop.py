"""The one training loop: stages over row numbers, on accelerate, that can be killed at any moment and
resumed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from offramp.training.batches import shuffled_batches
from offramp.training.checkpoint import read_json, write_json

# (model, row numbers [batch]) -> loss, figures for the log
LossOf = Callable[[Any, np.ndarray], tuple[Tensor, dict[str, float]]]


@dataclass(frozen=True)
class Stage:
    """One stretch of training with one optimizer.

    trains: prefixes of parameter names that learn; all others are frozen for the stage.
    lengths: tokens of every row [rows], for length bucketing; zeros where length does not matter.
    heads_lr: learning rate of what starts from nothing (exits, policies) where it shares a stage with a
    pretrained backbone; None: lr. policies_lr: that of policies alone; None: heads_lr.
    shared: whether processes share the work by gradient averaging; a stage over cached features is too small
    for that.
    """

    name: str
    trains: tuple[str, ...]
    lengths: np.ndarray
    loss: LossOf
    epochs: int
    batch_size: int
    lr: float
    heads_lr: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    shared: bool = True
    policies_lr: float | None = None


class Run:
    """A training run in a folder of its own: log.jsonl, remembered arrays, and the state to resume from.

    The state is written beside and renamed, so a kill at any moment leaves the last whole one. Batches and
    learning rates are functions of (seed, stage, step), random generators are part of the state: resumed on
    one CPU thread, a run ends with the weights of the uninterrupted one.
    """

    def __init__(
        self,
        network: Any,
        folder: Path,
        *,
        seed: int,
        precision: str = "no",
        save_every: float = 120.0,
    ) -> None:
        options = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[options])
        self.network = network.to(self.accelerator.device)
        self.folder, self.seed, self.save_every = folder, seed, save_every
        folder.mkdir(parents=True, exist_ok=True)
        self.stages_begun = 0
        self.position = {"stage": 0, "step": 0}
        self._optimizer_state: dict[str, Tensor] = {}
        if (folder / "state.json").is_file():
            self._read_state()

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return bool(self.accelerator.is_main_process)

    @property
    def between(self) -> bool:
        """Whether the stage after the one that was passed last has not begun: only then may weights be
        changed outside of a stage, or a resumed run would change them again.
        """
        return self.position == {"stage": self.stages_begun, "step": 0}

    def log(self, **figures: Any) -> None:
        """Append one line to log.jsonl."""
        if self.main:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps({"time": round(time.time(), 1), **figures}) + "\n")

    def remember(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor computed once and kept across a resume: what depends on the weights of this moment must
        not be computed again later.
        """
        file = self.folder / f"{name}.safetensors"
        if not file.is_file():
            value = compute().contiguous().cpu()
            if self.main:
                beside = file.with_suffix(".writing")
                save_file({name: value}, beside)
                os.replace(beside, file)
            self.accelerator.wait_for_everyone()
            return value
        return load_file(file)[name]

    def done_before(self) -> bool:
        """Whether the stage that comes next was finished before a resume; if so it counts as passed and
        must not be prepared for.
        """
        done = self.stages_begun < self.position["stage"]
        self.stages_begun += int(done)
        return done

    def fit(self, stage: Stage) -> None:
        """Run a stage, or what is left of it after a resume; a stage that is already done is skipped."""
        if self.done_before():
            return
        number = self.stages_begun
        self.stages_begun += 1
        learning = self._freeze(stage.trains)
        world = self.accelerator.num_processes if stage.shared else 1
        rank = self.accelerator.process_index if stage.shared else 0
        per_epoch = [
            shuffled_batches(stage.lengths, stage.batch_size, self.seed * 1000 + number, e)
            for e in range(stage.epochs)
        ]
        batches = [batch for epoch in per_epoch for batch in epoch]
        total = len(batches) // world
        optimizer = torch.optim.AdamW(_groups(learning, stage), lr=stage.lr)
        model: Any = self.network
        if world > 1:
            model, optimizer = self.accelerator.prepare(self.network, optimizer)
        if self.position["step"] == 0:
            torch.manual_seed(self.seed * 1000 + number)
        else:
            _restore(optimizer, learning, self._optimizer_state)
        self._optimizer_state = {}
        self.network.train()
        saved, smooth = time.monotonic(), None
        bar = tqdm(
            total=total,
            initial=self.position["step"],
            desc=stage.name,
            disable=not self.main,
            unit="step",
            mininterval=1.0,
        )
        for step in range(self.position["step"], total):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _schedule(step, total, stage.warmup)
            with self.accelerator.autocast():
                loss, figures = stage.loss(model, batches[step * world + rank])
            self.accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_([p for _, p in learning], stage.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.position["step"] = step + 1
            value = float(loss.detach())
            smooth = value if smooth is None else 0.98 * smooth + 0.02 * value
            bar.update()
            if step % 20 == 0 or step + 1 == total:
                bar.set_postfix(loss=f"{smooth:.4f}")
                self.log(stage=stage.name, step=step + 1, of=total, loss=round(value, 6), **figures)
            if time.monotonic() - saved > self.save_every and step + 1 < total:
                self._write_state(optimizer, learning)
                saved = time.monotonic()
        bar.close()
        self.network.eval()
        for parameter in self.network.parameters():
            parameter.requires_grad_(True)
        self.position = {"stage": number + 1, "step": 0}
        self._write_state(None, [])

    def _freeze(self, prefixes: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
        learning = []
        for name, parameter in self.network.named_parameters():
            learns = name.startswith(tuple(prefixes))
            parameter.requires_grad_(learns)
            if learns:
                learning.append((name, parameter))
        if not learning:
            raise ValueError(f"no parameter of the network begins with {', '.join(prefixes)}")
        return learning

    def _write_state(
        self, optimizer: torch.optim.Optimizer | None, learning: list[tuple[str, nn.Parameter]]
    ) -> None:
        if not self.main:
            return
        tensors = {f"weights/{name}": tensor for name, tensor in self.network.state_dict().items()}
        if optimizer is not None:
            for name, parameter in learning:
                for key, value in optimizer.state[parameter].items():
                    tensors[f"optimizer/{key}/{name}"] = value
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        # Two files take two renames: the tensors carry the position in their name, so state.json always names
        # a whole file.
        name = f"state-{self.position['stage']}-{self.position['step']}.safetensors"
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
        tensors = load_file(self.folder / str(state["tensors"]))
        self.network.load_state_dict(_under("weights/", tensors))
        self._optimizer_state = _under("optimizer/", tensors)
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random/cuda"])
        self.position = {"stage": int(state["stage"]), "step": int(state["step"])}


def best_precision() -> str:
    """bf16 where the hardware multiplies it natively, "no" (fp32) elsewhere: emulated bf16 is slower than
    fp32.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return "bf16" if "amx_bf16" in flags or "avx512_bf16" in flags else "no"


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up over a share of the steps, then linear decay to zero."""
    ramp = max(1, round(warmup * total))
    if step < ramp:
        return (step + 1) / ramp
    return (total - step) / max(1, total - ramp)


def _groups(learning: list[tuple[str, nn.Parameter]], stage: Stage) -> list[dict[str, Any]]:
    groups = []
    heads = stage.lr if stage.heads_lr is None else stage.heads_lr
    policies = heads if stage.policies_lr is None else stage.policies_lr
    for part, peak in {"": stage.lr, "exits": heads, "policies": policies}.items():
        for matrices in (False, True):
            chosen = [p for name, p in learning if _part(name) == part and (p.ndim > 1) == matrices]
            # Biases and norms are one-dimensional; decaying them only hurts.
            decay = stage.weight_decay if matrices else 0.0
            if chosen:
                groups.append({"params": chosen, "peak": peak, "lr": peak, "weight_decay": decay})
    return groups


def _part(name: str) -> str:
    """ "exits", "policies" or, for the backbone and its pooler, nothing."""
    top = name.partition(".")[0]
    return top if top in ("exits", "policies") else ""


def _restore(
    optimizer: torch.optim.Optimizer, learning: list[tuple[str, nn.Parameter]], tensors: dict[str, Tensor]
) -> None:
    parameters = dict(learning)
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        parameter = parameters[name]
        # The step counter stays on the CPU, where AdamW keeps it.
        optimizer.state[parameter][slot] = value if slot == "step" else value.to(parameter.device)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
