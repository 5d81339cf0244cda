"""What a bundle is verified on: real text, or images, as the stem takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer

from offramp.export.sentences import SENTENCES
from offramp.runtime.inputs.images import ImageInput, normalized, pixels
from offramp.training.checkpoint import Checkpoint, TextFacts

MOST, ROWS, ALONE = 256, 4, 8  # samples that are used, rows of a batch, samples that also go alone
DRAWN = 16  # images that are drawn where none are given
Values = dict[str, torch.Tensor]


Batches = Iterator[tuple[Values, torch.Tensor]]


def batches(checkpoint: Checkpoint, samples: Sequence[str] | None = None) -> Batches:
    """Stem inputs, and which tokens are real [batch, seq].

    samples: texts or paths of images; None: SENTENCES, or images drawn with a fixed seed. Raises BadInput for
    an image that cannot be read.
    """
    if isinstance(checkpoint.input, ImageInput):
        return _images(checkpoint, checkpoint.input, samples)
    return _texts(checkpoint, checkpoint.input, SENTENCES if samples is None else samples)


def _images(checkpoint: Checkpoint, facts: ImageInput, files: Sequence[str] | None) -> Batches:
    """Batches of images, the last ones alone."""
    found = [pixels(file, facts) for file in files[:MOST]] if files is not None else _drawn(facts)
    if not found:
        raise ValueError("no image to verify on; give a file with at least one path")
    groups = [found[start : start + ROWS] for start in range(0, len(found), ROWS)]
    for group in [*groups, *([one] for one in found[-2:])]:
        values = torch.from_numpy(normalized(np.stack(group), facts))
        yield {"pixel_values": values}, torch.ones(len(group), checkpoint.network.longest, dtype=torch.bool)


def _drawn(facts: ImageInput) -> list[np.ndarray]:
    """Coarse random squares with fine noise over them: neither flat nor only noise, as pictures are."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (DRAWN, 4, 4, 3))
    high, wide = -(-facts.height // 4), -(-facts.width // 4)
    large = coarse.repeat(high, 1).repeat(wide, 2)[:, : facts.height, : facts.width]
    noisy = large + rng.normal(0, 20, large.shape)
    return list(noisy.clip(0, 255).astype(np.uint8))


def _texts(checkpoint: Checkpoint, facts: TextFacts, texts: Sequence[str]) -> Batches:
    """Padded batches, some texts alone, and a row of one token."""
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer))
    tokenizer.no_padding()
    tokenizer.enable_truncation(facts.longest)
    found = [tokenizer.encode(facts.prefix + text) for text in texts[:MOST]]
    if not found:
        raise ValueError("no text to verify on; give a file with at least one line")
    groups = [found[start : start + ROWS] for start in range(0, len(found), ROWS)]
    by_length = sorted(found, key=lambda encoding: len(encoding.ids))
    groups += [[one] for one in by_length[:: max(1, len(by_length) // ALONE)]]
    groups += [[by_length[0]], [by_length[-1]]]
    for group in groups:
        longest = max(len(encoding.ids) for encoding in group)
        ids = torch.full((len(group), longest), facts.pad_id)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, encoding in enumerate(group):
            ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
            mask[row, : len(encoding.ids)] = 1
            types[row, : len(encoding.ids)] = torch.tensor(encoding.type_ids)
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        yield batch, mask.bool()
    yield {name: value[:1, :1] for name, value in batch.items()}, mask[:1, :1].bool()
