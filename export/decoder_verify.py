"""Hold a decoder's written bundle to its network, before the bundle gets its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from offramp.models.decoder import DecoderNetwork
from offramp.models.depth import hidden_states
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.bundle.manifest import GATE, LEAVING, NEXT
from offramp.runtime.engines.ort_decoder import DecoderEngine
from offramp.runtime.engines.threads import claim
from offramp.runtime.sequence import Lane

PIECES = (8, 1, 1)  # tokens of a prompt, and steps behind it
TOLERANCE = 1e-3  # of fp32, by the largest value of the tensor
# Of other variants only that they are numbers, and near enough that a wrong graph would show.
LOOSE = {"fp16": 0.1, "int8": 0.2, "int4": 1.5}
SURE = 1.0  # logit of a gate: one near 0 is half open, whatever its own size


class NotTheNetwork(ValueError):
    """A graph says something else than the network."""


@torch.no_grad()
def verify_decoder(network: DecoderNetwork, folder: Path) -> None:
    """Run all stages of a bundle on a prompt and two tokens; raises NotTheNetwork naming the worst."""
    bundle = open_bundle(folder)
    total = sum(PIECES)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, network.vocab_size, (1, total), generator=generator)
    states = [state[0] for state in hidden_states(network, ids)]
    ends = [segment.blocks[-1] for segment in bundle.manifest.segments]
    pool = claim(onnxruntime, None, True)
    for variant in bundle.manifest.variants:
        engine = DecoderEngine(onnxruntime, bundle, variant, pool, share=False)
        lane, start = Lane(engine), 0
        for count in PIECES:
            lane.feed(ids[0, start : start + count].tolist())
            here = slice(start, start + count)
            for number, end in enumerate(ends):
                made, state = lane.advance(number), states[end - 1][here]
                name = f"{bundle.manifest.segments[number].name}, variant {variant}, tensor"
                _hold(f"{name} {NEXT}hidden", made.hidden, state, variant)
                if end == ends[-1]:
                    continue
                _hold(f"{name} {LEAVING}", made.leaving, network.leaving(end, state), variant)
                if made.gate is not None:
                    _hold(f"{name} {GATE}", made.gate, network.gate(end, state).sigmoid(), variant, least=SURE)
            logits = network.head(states[-1][here])
            for draft in (False, True):
                said = lane.cache.logits(made.hidden, draft)
                name = f"{'draft' if draft else 'head'}, variant {variant}, tensor logits"
                _hold(name, said, logits[:, : said.shape[1]], variant)
            start += count
        _hold_fills(network, engine, ids, variant)


def _hold_fills(network: DecoderNetwork, engine: DecoderEngine, ids: torch.Tensor, variant: str) -> None:
    """What a token that leaves behind the first segment leaves in the caches of the others."""
    if not engine.fills:
        return
    lane, total = Lane(engine), ids.shape[1]
    lane.feed(ids[0].tolist())
    hidden = torch.from_numpy(lane.advance(0).hidden.copy())[None]
    positions = torch.arange(total)[None]
    context = network.family.context(network.model, hidden, positions)
    for number, stage in enumerate(engine.manifest.segments[1:], 1):
        lane.fill(number)
        caches = {name: part for stack in lane.cache.stacks for name, part in stack.parts.items()}
        for block in stage.blocks:
            keys, values = network.family.keep(network.blocks[block - 1], hidden, context)
            for kind, wanted in (("k", keys.transpose(2, 3)), ("v", values)):
                found = caches[f"past_{kind}_{block}"]
                found = found[..., :total] if kind == "k" else found[:, :, :total]
                name = f"{engine.fills[stage.blocks].name}, variant {variant}, tensor new_{kind}_{block}"
                _hold(name, found, wanted, variant)


def _hold(
    what: str, found: NDArray[np.float32], wanted: torch.Tensor, variant: str, least: float = 1e-6
) -> None:
    """least: what the largest value counts as where it is smaller, in variants that round."""
    right = wanted.numpy()
    scale = max(1e-6 if variant == "fp32" else least, float(np.abs(right).max()))
    apart = float(np.abs(found - right).max()) / scale
    allowed = TOLERANCE if variant == "fp32" else LOOSE[variant]
    if not apart <= allowed:
        raise NotTheNetwork(
            f"{what}: {apart:.3g} of its largest value apart from torch, at most {allowed:g} is right; "
            "no bundle was written"
        )
