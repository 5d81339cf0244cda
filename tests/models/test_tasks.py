"""What exits give for each task, and the certainty that rules read of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import tiny_families
import torch

from offramp.models.families import FAMILIES
from offramp.models.network import EarlyExitNetwork, NetworkSpec
from offramp.models.own_head import OwnHead, classification_class, own_head_of, task_of_head
from offramp.models.tasks import (
    EMBEDDING,
    MULTI_LABEL,
    REGRESSION,
    SURE,
    TASKS,
    TOKENS,
    certainty_logits,
    certainty_of_labels,
    certainty_of_words,
    threshold_logits,
    words_mask,
)

LABELS = ("O", "B-PER", "I-PER", "B-LOC")
TEXT = [name for name in sorted(FAMILIES) if FAMILIES[name].vision is None]


def token_model(name: str) -> Any:
    config = tiny.CONFIGS[name]() if name in tiny.CONFIGS else tiny_families.config(name)
    config.architectures, config.id2label = [], dict(enumerate(LABELS))
    torch.manual_seed(0)
    model = classification_class(config, per_token=True).from_config(config)
    return tiny_families.lively(model).eval()


def word_inputs(name: str) -> dict[str, torch.Tensor]:
    inputs = tiny.inputs(name) if name in tiny.CONFIGS else tiny_families.text_inputs(name)
    starts = torch.zeros_like(inputs["attention_mask"])
    starts[:, 1:4] = 1
    starts[0, 2] = 0
    return {**inputs, "word_starts": starts}


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_the_last_exit_gives_the_logits_of_the_model_that_classifies_tokens(name: str) -> None:
    model, inputs = token_model(name), word_inputs(name)
    known = {key: inputs[key] for key in ("attention_mask", *FAMILIES[name].inputs)}
    expected = model(**known).logits[inputs["word_starts"].bool()]  # [words, labels]
    spec = NetworkSpec(LABELS, (1, 2, 3), "none", own_head=True, task=TOKENS)
    head = own_head_of(model, 0.1, per_token=True)
    network = EarlyExitNetwork(copy.deepcopy(model.base_model), spec, head).eval()
    torch.testing.assert_close(network(inputs).logits[:, -1], expected, atol=2e-5, rtol=1e-5)


def test_the_head_of_a_model_names_its_task() -> None:
    config = tiny.CONFIGS["bert"]()
    for architecture, settings, task in (
        ("BertForTokenClassification", {}, TOKENS),
        ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}, MULTI_LABEL),
        ("BertForSequenceClassification", {"num_labels": 1}, REGRESSION),
        ("BertModel", {}, None),
    ):
        changed = copy.deepcopy(config)
        changed.architectures = [architecture]
        for key, value in settings.items():
            setattr(changed, key, value)
        assert task_of_head(changed) == task


def test_the_least_certain_label_is_the_one_next_to_its_threshold() -> None:
    logits = torch.tensor([[2.0, -3.0, 0.5], [4.0, 5.0, -6.0]])
    certainty = certainty_of_labels(logits, None, threshold_logits((0.5, 0.5, 0.5)))
    torch.testing.assert_close(certainty, torch.tensor([0.5, 4.0]))
    certainty = certainty_of_labels(logits, None, threshold_logits((0.5, 0.5, 0.8)))  # logit 1.386
    torch.testing.assert_close(certainty, torch.tensor([0.886294, 4.0]))


def test_the_probability_of_the_least_certain_label_is_what_rules_read() -> None:
    logits = certainty_logits(certainty_of_labels(torch.tensor([[2.0, -0.7]]), None, None))
    assert float(logits.softmax(-1)[0, 0]) == pytest.approx(float(torch.tensor(0.7).sigmoid()))


def test_the_least_certain_word_is_found_among_tokens_that_begin_one() -> None:
    logits = torch.tensor([[[1.0, 0.9, 0.0], [3.0, 1.0, 0.0], [0.0, 5.0, 1.0]]])
    assert float(certainty_of_words(logits, words_mask(torch.tensor([[1, 1, 1]])), None)) == pytest.approx(
        0.1
    )
    assert float(certainty_of_words(logits, words_mask(torch.tensor([[0, 1, 1]])), None)) == pytest.approx(
        2.0
    )


def test_a_row_without_a_word_is_sure() -> None:
    certainty = certainty_of_words(torch.randn(1, 3, 4), words_mask(torch.zeros(1, 3)), None)
    assert float(certainty) > SURE / 2


@torch.no_grad()
def test_values_are_in_the_units_of_the_data() -> None:
    network = EarlyExitNetwork(tiny.backbone("bert"), NetworkSpec((), (1, 2, 3), task=REGRESSION)).eval()
    before = network(tiny.inputs()).logits
    assert network.value_mean is not None and network.value_spread is not None
    network.value_mean.fill_(100.0)
    network.value_spread.fill_(10.0)
    torch.testing.assert_close(network(tiny.inputs()).logits, 100 + 10 * before)


@torch.no_grad()
def test_an_embedding_is_the_mean_of_the_tokens_at_length_one() -> None:
    backbone = tiny.backbone("mpnet")
    spec = NetworkSpec((), (1, 2, 3), task=EMBEDDING, own_head=True)
    network = EarlyExitNetwork(copy.deepcopy(backbone), spec, OwnHead("mean", (), 0.1)).eval()
    inputs = tiny.inputs("mpnet")
    mask = inputs["attention_mask"]
    hidden = backbone(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    given = network(inputs).logits
    torch.testing.assert_close(given[:, -1], torch.nn.functional.normalize(mean), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given.norm(dim=-1), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sorting"}, "choose one of classification"),
        ({"task": REGRESSION}, "regression has no labels"),
        ({"task": TOKENS}, "choose one of none"),
        ({"task": MULTI_LABEL, "policy": "both"}, "policies and error forecasts are for classification"),
        ({"task": MULTI_LABEL, "thresholds": (0.5,)}, "one for each label"),
        ({"thresholds": (0.5, 0.5)}, "thresholds"),
    ],
)
def test_a_specification_that_a_task_has_not_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkSpec(("a", "b"), (1, 2, 3), **changes)


def test_every_task_says_how_many_numbers_an_exit_gives() -> None:
    assert [task.outputs(5, 32) for task in TASKS.values()] == [5, 5, 5, 1, 32]
