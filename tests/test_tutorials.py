"""docs/tutorials: every block is run, in order, in an empty folder, on tiny models.

A comment before a block says how it differs:

    <!-- block: background -->   a server: it runs until the tutorial ends, and then has to end with code 0
    <!-- block: network -->      not run: downloads; likewise cluster and device. Their options must exist.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from documents import HEAVY, ROOT, entry
from tiny_bundles import CLASSIFIER, texts

TUTORIALS = ROOT / "docs" / "tutorials"
NAMES = ("add-exits", "images", "intents", "jetson", "language-model", "million-rows", "serve")
BLOCK = re.compile(
    r"(?:^<!-- block: (?P<kind>\w+) -->\n)?^```(?P<language>bash|python)\n(?P<code>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
KINDS = ("background", "network", "cluster", "device")
NOT_RUN = KINDS[1:]
START_SECONDS = 60


class Block(NamedTuple):
    """A block of code of a tutorial."""

    kind: str | None
    language: str
    code: str

    def commands(self) -> list[str]:
        """Its lines, with continued ones joined."""
        return self.code.replace("\\\n", " ").splitlines()


@pytest.fixture(autouse=True)
def own_precision() -> Iterator[None]:
    """Let trainings of this process choose their precision, whatever other tests of it chose before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def blocks_of(name: str) -> list[Block]:
    """The blocks of a tutorial, in order."""
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    return [Block(match["kind"], match["language"], match["code"]) for match in BLOCK.finditer(text)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Reader:
    """Somebody who types the blocks of a tutorial into a shell whose current folder is `folder`."""

    folder: Path
    printed: str = ""
    ports: dict[str, int] = field(default_factory=lambda: {"8000": free_port(), "8001": free_port()})
    servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def follow(self, name: str) -> str:
        """Run a tutorial; gives what its blocks print on stdout and stderr."""
        try:
            for block in blocks_of(name):
                self.run(block)
            for server in self.servers:
                server.send_signal(signal.SIGTERM)
                assert server.wait(START_SECONDS) == 0
        finally:
            for server in self.servers:
                server.kill()
                server.wait()
        return self.printed

    def run(self, block: Block) -> None:
        """Run one block; ports are free ones, and addresses that others reach are loopback."""
        code = block.code.replace("0.0.0.0", "127.0.0.1")
        for port, free in self.ports.items():
            code = code.replace(port, str(free))
        block = block._replace(code=code)
        if block.kind in NOT_RUN:
            return
        if block.kind == "background":
            self.start(code)
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "tutorial", "exec"), {})
            self.printed += out.getvalue()
        elif any(line.split(" ")[0] in HEAVY for line in block.commands()):
            for line in block.commands():
                self.command(line)
        else:
            self.shell(code)

    def command(self, line: str) -> None:
        """Run a line, in this process if it is one of HEAVY."""
        words = shlex.split(line)
        if words[0] not in HEAVY:
            return self.shell(line)
        result = CliRunner().invoke(entry(words[0]), words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
        self.printed += result.output
        return None

    def shell(self, code: str) -> None:
        """Run code by bash, which stops at the first command that fails."""
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", code],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
        self.printed += done.stdout + done.stderr

    def start(self, code: str) -> None:
        """Start a server, and wait until it answers."""
        words = shlex.split(code)
        if "--port" not in words:
            words += ["--port", str(self.ports["8000"])]
        port = int(words[words.index("--port") + 1])
        server = subprocess.Popen(words, cwd=self.folder, env=self.environment(), text=True)
        self.servers.append(server)
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert server.poll() is None, f"{code} ended with {server.returncode}"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.05)
        raise AssertionError(f"{code} does not listen after {START_SECONDS} s")

    def environment(self) -> dict[str, str]:
        """That of the test, with the commands of its Python first on PATH."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", Reader(tmp_path).environment()["PATH"])
    yield Reader(tmp_path)


def write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def measured_bundle(folder: Path) -> Path:
    """A copy of the tiny classifier with points full, dev-1.0 and so on."""
    shutil.copytree(CLASSIFIER, folder)
    rows = folder.with_name("rows_of_points.txt")
    write_lines(rows, texts(200, 3))
    done = CliRunner().invoke(entry("ee-calibrate"), [str(rows), "--bundle", str(folder)])
    assert done.exit_code == 0, done.output
    return folder


def test_every_tutorial_has_a_test() -> None:
    assert sorted(file.stem for file in TUTORIALS.glob("*.md")) == sorted([*NAMES, "index"])


@pytest.mark.parametrize("name", NAMES)
def test_marks_of_blocks_are_known(name: str) -> None:
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- block: (.*?) -->", text)) <= set(KINDS)
    assert len(blocks_of(name)) == text.count("```") // 2, "a block has another language, or none"
    assert text.count("<!-- block:") == sum(block.kind is not None for block in blocks_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_options_of_blocks_that_are_not_run_exist(name: str) -> None:
    for block in blocks_of(name):
        if block.kind not in NOT_RUN:
            continue
        for line in block.commands():
            words = shlex.split(line)
            command = Path(words[0]).name
            if command.startswith("ee-"):
                helped = CliRunner().invoke(entry(command), [*({"--ray"} & set(words)), "--help"])
                known = re.findall(r"--[a-z][\w-]*", helped.output)
                assert {word for word in words if word.startswith("--")} <= set(known) | {"--ray"}, line
            elif words[0] == "python" and not words[1].startswith("-"):
                assert (ROOT / words[1]).is_file(), line


@pytest.mark.parametrize("name", [*NAMES, "index"])
def test_extras_that_are_named_exist(name: str) -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    for extras in re.findall(r"'\.\[(.*?)\]'", text):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", settings, re.MULTILINE), f"no extra {extra}"


@pytest.mark.slow  # trains and exports
def test_add_exits(reader: Reader) -> None:
    import tiny

    tiny.classifier_folder(reader.folder / "my-model", steps=20, blocks=2)  # each takes seconds to export
    rows = dict.fromkeys(row["text"] for row in tiny.rows(2500, 5))  # each once
    write_lines(reader.folder / "traffic.txt", list(rows)[:1100])
    printed = reader.follow("add-exits")
    assert "risk-0.05" in printed and '"exit"' in printed
    assert len((reader.folder / "answers.jsonl").read_text().splitlines()) == 1100


@pytest.mark.slow  # trains and exports
def test_intents(reader: Reader) -> None:
    import tiny

    tiny.model_folder(reader.folder / "encoder", blocks=2)
    tiny.data_folder(reader.folder / "intents")
    write_lines(reader.folder / "requests.txt", [row["text"] for row in tiny.rows(200, 7)])
    printed = reader.follow("intents")
    assert "int8-dev-1.0" in printed and "mean depth 0.6" in printed
    assert (reader.folder / "bench.json").is_file()


@pytest.mark.slow  # trains and exports
def test_images(reader: Reader) -> None:
    import tiny

    tiny.image_model_folder(reader.folder / "vit")
    tiny.image_folder(reader.folder / "photos")
    printed = reader.follow("images")
    assert '"file"' in printed and "photos/test/red/" in printed
    assert len((reader.folder / "answers.jsonl").read_text().splitlines()) == 24


@pytest.mark.slow  # trains and exports
def test_language_model(reader: Reader) -> None:
    import tiny
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**tiny.DECODER_SIZES | {"num_hidden_layers": 5}))
    model.save_pretrained(reader.folder / "model")
    tiny.hub_tokenizer().save_pretrained(reader.folder / "model")
    for seed, (split, count) in enumerate({"train": 32, "dev": 8}.items()):
        rows = [{"text": row["text"]} for row in tiny.rows(count, seed)]
        tiny.write_rows(reader.folder / "texts", *rows, split=split)
    write_lines(
        reader.folder / "prompts.txt", ["the film was", "a very good plot", "not at all", "the scene"]
    )
    printed = reader.follow("language-model")
    assert '"tokens_per_s"' in printed and "speculative" in printed


@pytest.mark.slow  # starts two servers
def test_serve(reader: Reader) -> None:
    pytest.importorskip("uvicorn")
    measured_bundle(reader.folder / "bundle")
    printed = reader.follow("serve")
    assert '"results"' in printed and "offramp_" in printed and '"dev-1.0"' in printed


@pytest.mark.slow  # starts seven commands
def test_million_rows(reader: Reader) -> None:
    measured_bundle(reader.folder / "bundle")
    write_lines(reader.folder / "rows.txt", texts(300, 6))
    printed = reader.follow("million-rows")
    assert "300 answers.jsonl" in printed and "Counter({" in printed
    assert len((reader.folder / "all.jsonl").read_text().splitlines()) == 300


@pytest.mark.slow  # exports
def test_jetson(reader: Reader) -> None:
    import tiny

    tiny.model_folder(reader.folder / "model")
    tiny.data_folder(reader.folder / "data")
    # One exit: each segment takes seconds to export.
    reader.command("ee-train --model model --data data --recipe joint --exits 3 --set epochs=1 --out ckpt")
    reader.follow("jetson")
    assert (reader.folder / "bundle" / "segment_00_fp16.onnx").is_file()
