"""Data of layer_selection.py: prompts with short completions from labelled rows or texts, and ROUGE-L.

A task on which layers can be selected needs a wide gap between full depth and the floor, and answer tokens
that are decided by answer tokens: the first one is predicted by the prompt's last token, which runs all
blocks.

intents: a prompt lists several messages, the completion lists their labels in words, one a line after "-".
All labels but the first word are thus decided by tokens of the answer. Test rows come in two wordings of the
prompt, one after the other with the same `group`: a choice made by one is judged by the other.
sentences: the beginning of a text, and the sentence that follows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from offramp.training.data import BadData, read_splits
from offramp.training.lm_data import load_token_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDINGS = (
    "Messages:\n{messages}\nIntents:\n",
    "What does each of these messages ask for?\n{messages}\nAnswer:\n",
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
PROMPT_WORDS, LONGEST_PROMPT, COMPLETION_WORDS = 15, 60, (6, 30)  # of sentences; a prompt has at least 15


@dataclass(frozen=True)
class Pairs:
    """Rows of one split: token ids of prompts and completions (end of text included), and texts.

    groups: equal for rows that ask for the same in other words.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    references: list[str]
    groups: list[int]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def twins(self) -> np.ndarray | None:
        """By row the other row of its group [rows], or None unless every group has two rows."""
        members: dict[int, list[int]] = {}
        for row, group in enumerate(self.groups):
            members.setdefault(group, []).append(row)
        if any(len(rows) != 2 for rows in members.values()):
            return None
        twins = np.zeros(len(self), np.int64)
        for first, second in members.values():
            twins[[first, second]] = second, first
        return twins

    def first(self, count: int) -> Pairs:
        """The first rows."""
        parts = self.prompts[:count], self.completions[:count], self.references[:count], self.groups[:count]
        return Pairs(*parts)

    def batches(self, size: int) -> list[list[int]]:
        """Row numbers in batches of similar length."""
        order = sorted(range(len(self)), key=lambda row: (len(self.prompts[row]), len(self.completions[row])))
        return [order[start : start + size] for start in range(0, len(order), size)]


def read_pairs(
    folder: str, tokenizer: PreTrainedTokenizerBase, counts: dict[str, int], longest: int
) -> dict[str, Pairs]:
    """Read the first rows of splits of {prompt, completion}, with optional `group`; counts: rows by split.

    Rows without a prompt or a completion are left out. Raises BadData if a split is missing.
    """
    tokens, splits = load_token_rows(folder, tokenizer, longest), {}
    tables = read_splits(folder)
    for split, count in counts.items():
        if split not in tokens:
            raise BadData(f"{folder} has no {split} split")
        rows, table = tokens[split], tables[split][0]
        groups = table["group"] if "group" in table.column_names else range(len(rows))
        kept = [
            row
            for row in range(len(rows))
            if table["prompt"][row] and len(rows.ids[row]) > rows.starts[row] + 1
        ][:count]
        splits[split] = Pairs(
            [rows.ids[row][: rows.starts[row]] for row in kept],
            [rows.ids[row][rows.starts[row] :] for row in kept],
            [table["completion"][row] for row in kept],
            [int(groups[row]) for row in kept],
        )
    return splits


def in_words(label: str) -> str:
    """The name of a label as lower-case words: "PlayMusic" and "play_music" become "play music"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|_", " ", label).lower()


def intent_pairs(
    rows: Sequence[dict[str, str]], messages: int, seed: int, *, both_wordings: bool = False
) -> list[dict[str, object]]:
    """Shuffle rows {text, label_text} and join `messages` of them to one pair; the rest is left out.

    Wordings alternate; with both_wordings each pair is given in both, one after the other.
    """
    order, pairs = np.random.default_rng(seed).permutation(len(rows)).tolist(), list[dict[str, object]]()
    for group, start in enumerate(range(0, len(order) - messages + 1, messages)):
        members = [rows[number] for number in order[start : start + messages]]
        listed = "\n".join(f"- {' '.join(row['text'].split())}" for row in members)
        completion = "\n".join(f"- {in_words(row['label_text'])}" for row in members)
        for wording in WORDINGS if both_wordings else WORDINGS[group % 2 : group % 2 + 1]:
            prompt = wording.format(messages=listed)
            pairs.append({"prompt": prompt, "completion": completion, "group": group})
    return pairs


def sentence_pairs(texts: Iterable[str]) -> list[dict[str, object]]:
    """Of each text that is long enough: its first sentences as prompt, the next sentence as completion."""
    pairs = list[dict[str, object]]()
    for text in texts:
        words: list[str] = []
        for sentence in SENTENCE_END.split(" ".join(text.split())):
            if len(words) >= PROMPT_WORDS:
                if COMPLETION_WORDS[0] <= len(sentence.split()) <= COMPLETION_WORDS[1]:
                    prompt = " ".join(words[-LONGEST_PROMPT:])
                    pairs.append({"prompt": prompt, "completion": " " + sentence, "group": len(pairs)})
                break
            words += sentence.split()
    return pairs


def read_json_lines(file: Path) -> list[dict[str, str]]:
    """The rows of a file with one JSON object a line; texts may contain other line ends."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def write_split(folder: Path, split: str, rows: Sequence[dict[str, object]]) -> None:
    """Write rows as one split of a data folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def rouge_l(reference: str, answer: str) -> float:
    """ROUGE-L, F-measure from 0 to 1: longest common subsequence of lower-case words, not stemmed."""
    expected, given = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reference, answer))
    if not expected or not given:
        return float(expected == given)
    lengths = [0] * (len(given) + 1)  # of the common subsequence with each beginning of the answer
    for word in expected:
        before = lengths[:]
        for place, other in enumerate(given, 1):
            lengths[place] = (
                before[place - 1] + 1 if word == other else max(before[place], lengths[place - 1])
            )
    return 2 * lengths[-1] / (len(expected) + len(given))
