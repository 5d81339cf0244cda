"""What people see: how ee-train and ee-split end, ee-run on a terminal, completion, and the look of pages."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from tiny_bundles import CLASSIFIER

from offramp.runtime import entry
from offramp.runtime.output import TerminalOutput
from offramp.runtime.tuning import report

ROOT = Path(__file__).resolve().parent.parent
TRAINING: dict[str, Any] = {
    "recipe": "offramp",
    "data": {"rows": {"train": 64, "dev": 32}},
    "dev": {"full_depth": 81.25, "rows": 32},
    "operating_points": [
        {"name": "default", "measured": {"f1": 80.5, "mean_exit": 2.4, "macs_saved": 17.25}}
    ],
}


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """Let trainings of this process choose their precision, whatever other tests of it chose before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_training_ends_with_its_figures_and_the_command_that_splits_it(tmp_path: Path) -> None:
    from offramp.training.cli import training_summary

    (tmp_path / "bundle").mkdir()
    summary = training_summary(tmp_path / "my ckpt", TRAINING, 75.0)
    assert dict(summary.rows) == {
        "checkpoint": str(tmp_path / "my ckpt"),
        "recipe": "offramp",
        "rows": "64 train, 32 dev",
        "full depth": "81.25 % f1 on dev",
        "early exit": "80.50 % f1 on dev, 17.2 % of the computation saved",
        "time": "1 min 15 s",
    }
    assert summary.facts == {"checkpoint": str(tmp_path / "my ckpt"), "full_depth": 81.25, "rows": 32}
    words = [str(tmp_path / "my ckpt"), "--out", str(tmp_path / "bundle-2")]
    assert list(summary.next_command) == ["ee-split", *words]


def test_a_training_without_a_dev_split_has_no_figures_to_show(tmp_path: Path) -> None:
    from offramp.training.cli import training_summary

    training = {"recipe": "layerskip", "data": {"rows": {"train": 8}}}
    names = [name for name, _ in training_summary(tmp_path / "ckpt", training, 1.0).rows]
    assert names == ["checkpoint", "recipe", "rows", "time"]


@pytest.mark.slow
def test_train_split_and_the_command_they_name_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--json is one object on standard output; a pipe gets one line a phase; the named commands run."""
    import tiny

    from offramp.export.cli import main as split
    from offramp.training.cli import train

    monkeypatch.chdir(tmp_path)
    tiny.model_folder(tmp_path / "model")
    tiny.data_folder(tmp_path / "data")
    words = ["--model", "model", "--data", "data", "--out", "my ckpt", "--recipe", "joint"]
    trained = CliRunner().invoke(train, [*words, "--set", "epochs=1", "--json"])
    assert trained.exit_code == 0, trained.output
    facts = json.loads(trained.stdout)
    assert facts["checkpoint"] == "my ckpt" and facts["rows"] == 32
    lines = trained.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["joint", "dev"] and "loss" in lines[0]
    program, *words = shlex.split(facts["next"])
    assert program.endswith("ee-split")
    done = CliRunner().invoke(split, [*words, "--variants", "fp32", "--json"])
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)
    assert (written["bundle"], written["segments"], written["variants"]) == ("bundle", 3, ["fp32"])
    assert written["bytes"]["fp32"] == sum(file.stat().st_size for file in Path("bundle").glob("*.onnx"))
    assert written["max_difference"] < 1e-4 and "default" in written["points"]
    assert re.fullmatch(r"exporting: 4 graphs in .* s\n", done.stderr)
    program, *words = shlex.split(written["next"])
    environment = {**os.environ, "PYTHONWARNINGS": "default"}
    ran = subprocess.run(
        [sys.executable, "-m", "offramp.runtime.cli", *words],
        input=b"good film\n",
        capture_output=True,
        env=environment,
    )
    assert program.endswith("ee-run") and "label" in json.loads(ran.stdout)


def _on_terminal(text: bytes, **environment: str) -> list[str]:
    """The lines that ee-run shows on a terminal for lines of standard input."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "PYTHONIOENCODING")}
    done = subprocess.run(
        [sys.executable, "-m", "offramp.runtime.cli", "--bundle", str(CLASSIFIER)],
        input=text,
        stdout=slave,
        stderr=subprocess.PIPE,
        env={**kept, "TERM": "xterm", **environment},
    )
    os.close(slave)
    shown = os.read(master, 1 << 16).decode("utf-8")
    os.close(master)
    assert done.stderr == b""
    return shown.splitlines()


@pytest.mark.slow
def test_a_terminal_shows_a_bar_of_depth_before_each_answer() -> None:
    answer, error = _on_terminal(b"good film\n\n", PYTHONIOENCODING="utf-8")
    bar, _, value = answer.partition(" ")
    assert re.fullmatch("\x1b\\[32m━+\x1b\\[0m(\x1b\\[2m─+\x1b\\[0m)?", bar)
    assert json.loads(value)["label"]
    assert error == 13 * " " + '{"error": "empty line", "line": 2}'


@pytest.mark.slow
def test_a_terminal_without_colour_and_utf8_shows_plain_characters() -> None:
    (answer,) = _on_terminal(b"good film\n", NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert re.match("[#-]{12} {", answer)


@pytest.mark.parametrize(("depth", "bar"), [(1.0, 12 * "#"), (0.5, "######------"), (0.001, "#" + 11 * "-")])
def test_the_bar_is_the_share_of_the_blocks(depth: float, bar: str) -> None:
    stream = io.BytesIO()
    TerminalOutput(stream, colour=False, ascii_only=True).write_answer({"label": "é"}, depth)
    assert stream.getvalue().decode() == f'{bar} {{"label": "é"}}\n'


@pytest.mark.parametrize("command", ["train", "split", "calibrate", "push"])
@pytest.mark.parametrize("option", ["--quiet", "--json"])
def test_shells_complete_the_options(command: str, option: str) -> None:
    variables = {
        "_EE_COMPLETE": "bash_complete",
        "COMP_WORDS": f"ee {command} {option[:4]}",
        "COMP_CWORD": "2",
    }
    result = CliRunner().invoke(entry.main, [], env=variables, prog_name="ee")
    assert f"plain,{option}" in result.stdout


class _Page(HTMLParser):
    """The tags of a page, and for each table whether its parent scrolls."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.viewports: list[str | None] = []
        self.tables_scroll: list[bool] = []
        self.style = ""
        self._before: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("name") == "viewport":
            self.viewports.append(given["content"])
        if tag == "table":
            self.tables_scroll.append(self._before[1].get("class") == "wide")
        self._before = tag, given

    def handle_data(self, data: str) -> None:
        if self._before[0] == "style" and not self.style:
            self.style = data


def _compare_page() -> str:
    from offramp.benchmarks.compare.pages import read_result_file
    from offramp.benchmarks.compare.pictures import html_page

    return html_page(read_result_file(ROOT / "benchmarks" / "results" / "compare_trec6.json"))


def _bench_page(tmp_path: Path) -> str:
    from offramp.runtime.tuning.bench import measure_classifier

    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "good film", "label": 1}\n{"text": "bad plot", "label": 0}\n', encoding="utf-8")
    return report.html_page(measure_classifier(CLASSIFIER, data, rounds=1, starts=1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bench", "compare"])
def test_pages_have_one_style_and_fit_a_phone(tmp_path: Path, kind: str) -> None:
    page = _Page(_bench_page(tmp_path) if kind == "bench" else _compare_page())
    assert page.style == report.page_style()
    assert page.viewports == ["width=device-width, initial-scale=1"]
    assert page.tables_scroll and all(page.tables_scroll)


def test_colours_are_those_of_the_demo_page_in_light_and_dark() -> None:
    demo = (ROOT / "web" / "style.css").read_text(encoding="utf-8")
    colours = report.page_colours()
    assert demo.startswith(colours)
    light, dark = colours.split("@media (prefers-color-scheme: dark)")
    names = [re.findall(r"(--[\w-]+):", part) for part in (light, dark)]
    assert names[0] == names[1]
    assert set(re.findall(r"var\((--[\w-]+)\)", report.page_style())) <= set(names[0])
