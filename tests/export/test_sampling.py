"""Sampling has the probabilities and the log-probabilities of transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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

from offramp.runtime import Sampling, load_generator
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


@pytest.mark.slow
@torch.no_grad()
def test_greedy_text_with_a_penalty_and_its_logprobs_are_those_of_transformers(
    decoder_bundle: Callable[[str], tuple[Any, Path]],
) -> None:
    model, bundle = decoder_bundle("llama")
    asked = {"max_new_tokens": 12, "do_sample": False, "repetition_penalty": 1.4}
    with load_generator(bundle, rule="never") as session:
        for ids in ([5, 9, 30, 12, 44], [7, 7, 7]):
            answer = model.generate(
                torch.tensor([ids]), **asked, output_logits=True, return_dict_in_generate=True
            )
            expected = answer.sequences[0, len(ids) :].tolist()
            tokens = list(session.tokens(ids, 12, sampling=Sampling(repetition_penalty=1.4, logprobs=3)))
            assert [token.id for token in tokens] == expected
            for token, logits in zip(tokens, answer.logits, strict=True):
                top = logits[0].log_softmax(-1).topk(3)
                assert token.logprob == pytest.approx(float(logits[0].log_softmax(-1)[token.id]), abs=1e-4)
                assert [logprob for _, logprob in token.top_logprobs] == pytest.approx(
                    top.values.tolist(), abs=1e-4
                )
