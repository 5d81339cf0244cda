"""Sampling has the probabilities of transformers; its log-probabilities: test_generation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offramp.runtime import Sampling
from offramp.runtime.sampling import Sampler

IDS = [5, 9, 30, 12, 44, 9, 100, 250]  # of which the first five are the prompt
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.0, "top_k": 12},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.4, "top_p": 0.7},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 0.8, "min_p": 0.1},
    {"temperature": 1.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.7},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
]


def warped(logits: Any, options: dict[str, Any]) -> Any:
    """The probabilities of transformers, with its processors in the order of its generate."""
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    processors.append(TemperatureLogitsWarper(options["temperature"]))
    for name, warper in (
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ):
        if name in options:
            processors.append(warper(options[name]))
    ids: Any = torch.tensor([IDS])
    scores = processors(ids, torch.tensor(logits)[None])
    return scores.double().softmax(-1)[0].numpy()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_probabilities_are_those_of_transformers(options: dict[str, Any]) -> None:
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(0, 2.5, 1000).astype(np.float32)
        if seed % 4 == 0 and "top_p" not in options:  # equal logits; which of them top-p keeps is not defined
            logits = np.round(logits)
        expected = warped(logits, options)
        probabilities = Sampler(Sampling(**options), IDS[:5]).probabilities(logits, IDS)
        np.testing.assert_array_equal(probabilities > 0, expected > 0)
        np.testing.assert_allclose(probabilities, expected, atol=1e-7)
