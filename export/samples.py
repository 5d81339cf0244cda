"""Samples on which a classifier's bundle is verified: texts or images, as inputs of the stem."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer

from offramp.export.segments import Values
from offramp.runtime.inputs.images import ImageInput, normalize_pixels, picture_pixels
from offramp.runtime.inputs.words import word_starts
from offramp.training.checkpoint import Checkpoint, TextFacts

MAX_SAMPLES, ROWS, ALONE = 256, 4, 8  # samples that are used, rows of a batch, samples also run alone
RANDOM_IMAGES = 16  # if the caller gives none
Batches = Iterator[tuple[Values, torch.Tensor]]


def verification_batches(checkpoint: Checkpoint, samples: Sequence[str] | None = None) -> Batches:
    """Batches of the stem's inputs, each with a mask of its real tokens [batch, seq].

    samples: texts or paths of images; None: SENTENCES, or random images with a fixed seed. Raises BadInput
    for an image that cannot be read.
    """
    if isinstance(checkpoint.input, ImageInput):
        return _images(checkpoint, checkpoint.input, samples)
    return _texts(checkpoint, checkpoint.input, SENTENCES if samples is None else samples)


def _images(checkpoint: Checkpoint, facts: ImageInput, files: Sequence[str] | None) -> Batches:
    """Batches of images, then the last two images alone."""
    images = (
        _random_images(facts)
        if files is None
        else [picture_pixels(file, facts) for file in files[:MAX_SAMPLES]]
    )
    if not images:
        raise ValueError("no image to verify on; give a file with at least one path")
    groups = [images[start : start + ROWS] for start in range(0, len(images), ROWS)]
    for group in [*groups, *([image] for image in images[-2:])]:
        values = torch.from_numpy(normalize_pixels(np.stack(group), facts))
        yield {"pixel_values": values}, torch.ones(len(group), checkpoint.network.longest, dtype=torch.bool)


def _random_images(facts: ImageInput) -> list[np.ndarray]:
    """Random images of coarse squares with fine noise: like photographs, neither flat nor noise alone."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (RANDOM_IMAGES, 4, 4, 3))
    high, wide = -(-facts.height // 4), -(-facts.width // 4)
    large = coarse.repeat(high, 1).repeat(wide, 2)[:, : facts.height, : facts.width]
    noisy = large + rng.normal(0, 20, large.shape)
    return list(noisy.clip(0, 255).astype(np.uint8))


def _texts(checkpoint: Checkpoint, facts: TextFacts, texts: Sequence[str]) -> Batches:
    """Padded batches of texts, some texts alone, and a row of one token."""
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer))
    tokenizer.no_padding()
    tokenizer.enable_truncation(facts.longest)
    encodings = [tokenizer.encode(facts.prefix + text) for text in texts[:MAX_SAMPLES]]
    if not encodings:
        raise ValueError("no text to verify on; give a file with at least one line")
    groups = [encodings[start : start + ROWS] for start in range(0, len(encodings), ROWS)]
    by_length = sorted(encodings, key=lambda encoding: len(encoding.ids))
    groups += [[encoding] for encoding in by_length[:: max(1, len(by_length) // ALONE)]]
    groups += [[by_length[0]], [by_length[-1]]]
    for group in groups:
        longest = max(len(encoding.ids) for encoding in group)
        ids = torch.full((len(group), longest), facts.pad_id)
        mask, types, starts = torch.zeros_like(ids), torch.zeros_like(ids), torch.zeros_like(ids)
        for row, encoding in enumerate(group):
            ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
            mask[row, : len(encoding.ids)] = 1
            types[row, : len(encoding.ids)] = torch.tensor(encoding.type_ids)
            starts[row, : len(encoding.ids)] = torch.tensor(word_starts(encoding, len(facts.prefix)))
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "word_starts": starts}
        yield batch, mask.bool()
    yield {name: value[:1, :1] for name, value in batch.items()}, mask[:1, :1].bool()


# From one word to over a hundred.
SENTENCES = (
    "Yes.",
    "Bread",
    "It rained.",
    "The train was late again this morning.",
    "A small dog slept under the kitchen table.",
    "How many bridges cross the river between the two towns?",
    "She closed the book and put it back on the shelf.",
    "Not bad at all, though I would not call it good either.",
    "The museum opens at nine and closes at half past five, except on Mondays.",
    "Das Café an der Straße öffnet früh, schließt aber schon um drei.",
    "Le garçon a mangé sa pomme, puis il est rentré à la maison.",
    "El niño compró una piña y dos kilos de jalapeños.",
    "Мост через реку открыли весной.",
    "橋は川の上にあります。",
    "3.14, 42 and 1,000,000 are numbers; ½ and ∞ are less common ones.",
    "WHY IS THIS NOTICE WRITTEN IN CAPITAL LETTERS?",
    "e-mail: someone@example.org, see also https://example.org/a?b=c#d",
    "An hour later the clouds had gone, and the hills stood clear against the evening sky.",
    "Who wrote the song that they played at the end?",
    "The recipe asks for two eggs, a cup of flour, a pinch of salt and a little patience.",
    "What a day",
    "I expected little, and even so I left before the end.",
    "The battery lasts a full day, the screen is bright, and the keys are a pleasure to type on.",
    "Nobody at the meeting could say when the old bridge had been built or who had paid for it.",
    "The second half is slower than the first; the ending makes up for it.",
    "Turn left at the church, follow the wall, and you will see a green door.",
    "In which year did the harbour freeze over for the first time?",
    "😀 fine ... thanks :-)",
    "The committee, which had met every Thursday for eleven years, decided without much debate that it "
    "would from now on meet every second Thursday, and that the minutes would be shorter.",
    "Early in the spring, when the snow on the lower slopes has melted and the paths are dry enough to "
    "walk on, the farmers of the valley drive their cattle up to the high meadows, where they stay until "
    "the first cold nights of autumn send them down.",
    "The film follows three sisters who inherit a lighthouse that none of them wants. The eldest would "
    "sell it at once, the second would turn it into a hotel, and the youngest, who has not spoken to the "
    "others in years, would simply like to live in it. Nothing much happens: they argue, they paint a "
    "wall, a storm comes and goes, and a neighbour brings soup. Yet the dialogue is so well observed, and"
    " the three actors so at ease with one another, that two hours pass like one, and when at the end the"
    " lamp is lit for the last time it is hard not to feel that something of one's own has been put out.",
    "To change the filter, first switch the machine off and wait until it has cooled down. Open the flap "
    "at the back, pull the grey handle towards you and lift the old filter out; it may drip, so keep a "
    "cloth at hand. Rinse the new filter under cold water for about a minute, press it into the holder "
    "until it clicks, and close the flap. Switch the machine on again, press both buttons together for "
    "three seconds, and let it run once without anything in it. The light stops blinking when the machine"
    " is ready. Filters last for roughly two months, or for one if your water is hard; the machine counts"
    " the days by itself, and it will remind you in good time. Used filters belong in the household "
    "waste, not with the paper or the glass.",
)
