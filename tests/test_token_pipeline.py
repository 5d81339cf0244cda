"""Entities of a TokenClassifier are those of transformers' pipeline with aggregation_strategy="first"."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from scripted_traces import trace_of
from tiny_bundles import TOKENS
from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast, pipeline

from offramp.runtime import TokenClassifier, load
from offramp.runtime.bundle.files import open_bundle
from offramp.runtime.inputs.text import TextRow, open_tokenizer

pytestmark = pytest.mark.slow

# No unknown words: the pipeline takes each of them for a word of its own.
PIECES = ["film", "films", "warmly", "Ann", "anna", "paris", "good", "goods", ".", "very", "lovely"]


@pytest.fixture(scope="module")
def session() -> Iterator[TokenClassifier]:
    with load(TOKENS) as session:
        assert isinstance(session, TokenClassifier)
        yield session


@pytest.mark.parametrize(
    "labels", [("O", "B-PER", "I-PER", "B-LOC", "I-LOC"), ("O", "PER", "LOC", "I-PER", "X")]
)
def test_entities_are_those_of_the_pipeline(session: TokenClassifier, labels: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(**tiny.SIZES, id2label=dict(enumerate(labels)))).eval()
    torch.nn.init.normal_(model.classifier.weight)
    torch.nn.init.normal_(model.bert.embeddings.word_embeddings.weight)
    session.manifest = replace(session.manifest, labels=labels)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=open_tokenizer(open_bundle(TOKENS), session.manifest.input),  # type: ignore[arg-type]
        **{"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"},
    )
    answer_as_transformers = pipeline(
        "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="first", device="cpu"
    )
    random, kinds = np.random.default_rng(0), list[str]()
    for _ in range(30):
        text = " ".join(random.choice(PIECES, random.integers(1, 12))).replace(" .", ".")
        (row,) = session._reader.read([text])
        assert isinstance(row, TextRow)
        inputs = {name: torch.tensor(array) for name, array in session._reader.arrays([row]).items()}
        del inputs["word_starts"]
        with torch.no_grad():
            logits = model(**inputs).logits[0].numpy()
        expected = answer_as_transformers(text)
        answer = session._answer(trace_of(logits), 0, row)
        assert [(e.entity_group, e.start, e.end) for e in answer.entities] == [
            (e["entity_group"], e["start"], e["end"]) for e in expected
        ]
        assert [e.score for e in answer.entities] == pytest.approx(
            [float(e["score"]) for e in expected], abs=1e-5
        )
        assert all(e.word == text[e.start : e.end] for e in answer.entities)
        kinds += [entity.entity_group for entity in answer.entities]
    assert len(kinds) > 60 and len(set(kinds)) > 1
