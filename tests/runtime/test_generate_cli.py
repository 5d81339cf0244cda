"""ee-run on a bundle that generates text: prompts in, JSON lines or the text itself out."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_bundles import CLASSIFIER, GENERATOR

from offramp.runtime import TextGenerator, cli, load_generator
from offramp.runtime.generate_cli import write_answers
from offramp.runtime.inputs.lines import PROMPTS, read_lines
from offramp.runtime.output import Output

PROMPT = "the film was good and"
MESSAGES = [{"role": "user", "content": "a good film"}]
KEYS = ["text", "tokens", "depth", "blocks_run", "ms", "first_ms", "tokens_per_s", "ended", "repeated_tokens"]


def run(*options: str, data: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, objects on standard output, and standard error."""
    result = CliRunner().invoke(cli.main, ["--bundle", str(GENERATOR), *options], input=data)
    assert isinstance(result.exception, (SystemExit, type(None))), result.exception
    return result.exit_code, [json.loads(line) for line in result.stdout.splitlines()], result.stderr


@pytest.fixture(scope="module")
def session() -> Iterator[TextGenerator]:
    with load_generator(GENERATOR, rule="never") as session:
        yield session


def answers(
    session: TextGenerator, *values: Any, as_it_comes: bool = False, max_new_tokens: int = 6
) -> tuple[list[Any], int, str]:
    """Objects (or the text) that are written for JSON lines, the number of errors, and the report."""
    out = io.BytesIO()
    data = "".join(json.dumps(value) + "\n" for value in values).encode()
    lines = read_lines(io.BytesIO(data), "json", PROMPTS)
    failed, report = write_answers(
        session, lines, Output(out), max_new_tokens=max_new_tokens, as_it_comes=as_it_comes
    )
    text = out.getvalue().decode()
    return [text] if as_it_comes else [json.loads(line) for line in text.splitlines()], failed, report


def test_answer_of_a_plain_prompt(session: TextGenerator) -> None:
    code, objects, errors = run("--rule", "never", "--max-new-tokens", "6", data=f"{PROMPT}\n")
    assert (code, errors) == (cli.ALL_ANSWERED, "") and list(objects[0]) == KEYS
    expected = "".join(chunk.text for chunk in session.generate(PROMPT, 6))
    assert (objects[0]["text"], objects[0]["tokens"]) == (expected, 6)
    assert objects[0]["depth"] == objects[0]["blocks_run"] == 3
    assert 0 < objects[0]["first_ms"] <= objects[0]["ms"]


def test_depth_and_blocks_run_are_means() -> None:
    options = ("--rule", "fixed", "--threshold", "1", "--max-new-tokens", "4")
    _, objects, _ = run(*options, data=f"{PROMPT}\n")
    assert objects[0]["depth"] == objects[0]["blocks_run"] == 1.5  # 3, 1, 1, 1


def test_json_lines_have_prompt_or_messages_and_options(session: TextGenerator) -> None:
    messages = [{"role": "user", "content": "a good film"}]
    objects, failed, _ = answers(
        session,
        {"prompt": "a film", "max_new_tokens": 3},
        {"messages": messages, "max_new_tokens": 4},
        {"prompt": "a film"},
    )
    assert [value["tokens"] for value in objects] == [3, 4, 6] and failed == 0
    word = objects[2]["text"].split()[1]
    for stop in (word, ["unheard of", word]):
        (stopped,), _, _ = answers(session, {"prompt": "a film", "stop": stop})
        assert stopped["text"] == objects[2]["text"][: objects[2]["text"].index(word)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"messages": "hello"}, "messages: expected a list of them, found 'hello'"),
        ({"messages": []}, "expected messages, found none"),
        ({"messages": [{"role": "user"}]}, "message 0: expected a role and a content"),
        ({"stop": "a"}, '"prompt": expected a string'),
        ({"prompt": ""}, '"prompt" is empty'),
        ({"prompt": "a", "tokens": 3}, "'tokens': a line has prompt or messages, max_new_tokens and stop"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens: expected a whole number from 1, found 0"),
        ({"prompt": "a", "max_new_tokens": True}, "expected a whole number from 1, found True"),
        ({"prompt": "a", "max_new_tokens": "9"}, "expected a whole number from 1, found '9'"),
        ({"prompt": "a", "stop": 3}, "stop: expected a string or a list of strings, found 3"),
        ({"prompt": "a", "stop": ["b", ""]}, "stop: expected a string or a list of strings"),
        ({"prompt": "a", "temperature": -1}, "temperature -1: expected a number from 0 to 100"),
        ({"prompt": "a", "top_p": 0.5}, "top_p 0.5: it limits what is drawn, and without a temperature"),
        ({"prompt": "a", "logprobs": True}, "logprobs True: expected a whole number, 0 to 20"),
        ({"prompt": "a", "tools": []}, "tools: it is for messages, and this line has a prompt"),
        ({"messages": [], "chat_template_kwargs": 3}, "chat_template_kwargs: expected an object, found 3"),
        ({"messages": [], "chat_template": 3}, "chat_template: expected the name of a template, found 3"),
        ({"messages": MESSAGES, "chat_template": "x"}, "chat template 'x': this bundle has default"),
        ({"messages": MESSAGES, "tools": "x"}, "tools: expected a list of JSON schemas, found 'x'"),
        ({"prompt": "a " * 80}, "this network reads 64, prompt and answer together"),
    ],
    ids=str,
)
def test_bad_line_keeps_its_place(session: TextGenerator, value: Any, message: str) -> None:
    objects, failed, report = answers(session, {"prompt": "a film"}, value, {"prompt": "a film"})
    assert failed == 1 and "2, 1 with errors" in report
    assert objects[1]["line"] == 2 and message in objects[1]["error"]
    assert objects[0]["text"] == objects[2]["text"]


def test_lines_with_messages_have_arguments_of_the_template(session: TextGenerator) -> None:
    pytest.importorskip("jinja2")
    options = {"tools": [{"name": "t"}], "chat_template": "default", "chat_template_kwargs": {"x": 1}}
    objects, failed, _ = answers(session, {"messages": MESSAGES}, {"messages": MESSAGES, **options})
    assert failed == 0 and objects[0]["text"] == objects[1]["text"]


def test_an_answer_says_why_it_ended(session: TextGenerator) -> None:
    (plain,), _, _ = answers(session, {"prompt": PROMPT})
    word = plain["text"].split()[1]
    values = [{"prompt": PROMPT, "stop": word}, {"prompt": PROMPT, "max_new_tokens": 500}]
    objects, _, _ = answers(session, *values)
    assert [plain["ended"], *(value["ended"] for value in objects)] == ["length", "stop", "context"]


def test_answers_that_end_in_a_loop_are_counted_on_stderr() -> None:
    """A random network soon repeats itself."""
    data = '{"prompt": "a film"}\n{"prompt": "a plot", "max_new_tokens": 2}\n'
    options = ("--rule", "never", "--max-new-tokens", "60")
    _, objects, errors = run(*options, data=data)
    assert objects[0]["repeated_tokens"] > 0 == objects[1]["repeated_tokens"]
    assert errors.startswith("ee-run: 1 of 2 answers end in a loop") and errors.count("\n") == 1


DRAWN = ("--temperature", "1", "--top-k", "20", "--seed", "7")


@pytest.mark.slow
def test_a_seed_gives_the_same_texts_and_each_line_its_own() -> None:
    data = f"{PROMPT}\n" * 3
    _, objects, _ = run(*DRAWN, data=data)
    assert [value["seed"] for value in objects] == [7, 8, 9] and list(objects[0]) == [*KEYS, "seed"]
    assert len({value["text"] for value in objects}) == 3
    assert [value["text"] for value in run(*DRAWN, data=data)[1]] == [value["text"] for value in objects]


def test_a_text_is_drawn_again_with_the_seed_of_its_answer() -> None:
    _, (drawn,), _ = run("--temperature", "1", data=f"{PROMPT}\n")
    _, (again,), _ = run("--temperature", "1", "--seed", str(drawn["seed"]), data=f"{PROMPT}\n")
    assert again["text"] == drawn["text"] != run(data=f"{PROMPT}\n")[1][0]["text"]


@pytest.mark.slow
def test_fields_of_a_line_take_the_place_of_options() -> None:
    lines = [
        {"prompt": PROMPT},
        {"prompt": PROMPT, "temperature": 0},
        {"prompt": PROMPT, "seed": 7, "top_p": None},
    ]
    _, objects, _ = run(*DRAWN, data="".join(json.dumps(line) + "\n" for line in lines))
    greedy = run(data=f"{PROMPT}\n")[1][0]["text"]
    assert objects[0]["text"] == objects[2]["text"] != objects[1]["text"] == greedy
    assert "seed" not in objects[1]


def test_penalties_change_what_is_chosen(session: TextGenerator) -> None:
    line = {"prompt": "a film", "max_new_tokens": 40}
    values = [line, line | {"repetition_penalty": 2}, line | {"frequency_penalty": 2, "presence_penalty": 2}]
    objects, failed, _ = answers(session, *values)
    assert failed == 0 and len({value["text"] for value in objects}) == 3


def test_logprobs_are_those_of_the_tokens(session: TextGenerator) -> None:
    code, (value,), _ = run("--rule", "never", "--max-new-tokens", "5", "--logprobs", "3", data=f"{PROMPT}\n")
    assert code == cli.ALL_ANSWERED and list(value) == [*KEYS, "logprobs"] and len(value["logprobs"]) == 5
    chunks = list(session.generate(PROMPT, 5))
    for entry, chunk in zip(value["logprobs"], chunks, strict=True):
        assert entry["token"] == chunk.token == entry["top_logprobs"][0]["token"]
        assert entry["text"].strip() == chunk.text.strip()
        numbers = [top["logprob"] for top in entry["top_logprobs"]]
        assert numbers == sorted(numbers, reverse=True) and numbers[0] == entry["logprob"] < 0


def test_logprobs_0_leaves_out_other_tokens() -> None:
    _, (value,), _ = run("--max-new-tokens", "2", "--logprobs", "0", data=f"{PROMPT}\n")
    assert [list(entry) for entry in value["logprobs"]] == [["token", "text", "logprob"]] * 2


def test_options_of_sampling_are_for_generated_text() -> None:
    result = CliRunner().invoke(
        cli.main, ["--bundle", str(CLASSIFIER), "--temperature", "1"], input="a film\n"
    )
    assert result.exit_code == cli.NOT_STARTED and not result.stdout
    assert "--temperature: it is for bundles that generate text; leave it out" in result.stderr


def test_bad_lines_set_the_exit_code() -> None:
    code, objects, _ = run("--max-new-tokens", "2", data='{"prompt": "a film"}\n{"messages": 3}\n')
    assert code == cli.SOME_FAILED and ["text" in value for value in objects] == [True, False]


def test_text_as_it_comes_is_the_text_of_the_answers(session: TextGenerator) -> None:
    prompts = [{"prompt": PROMPT}, {"prompt": "a film"}]
    objects, _, _ = answers(session, *prompts)
    (text,), failed, _ = answers(session, *prompts, as_it_comes=True)
    assert text == "".join(value["text"] + "\n" for value in objects) and failed == 0


def test_text_as_it_comes_is_flushed_after_every_token(session: TextGenerator) -> None:
    lengths = []  # of the text at each flush

    class Terminal(io.BytesIO):
        def flush(self) -> None:
            lengths.append(len(self.getvalue()))

    terminal = Terminal()
    lines = read_lines(io.BytesIO(PROMPT.encode()), "text", PROMPTS)
    write_answers(session, lines, Output(terminal), max_new_tokens=6, as_it_comes=True)
    assert len(lengths) == 7 and len(set(lengths)) > 2 and lengths == sorted(lengths)


def test_answer_is_written_before_the_next_prompt_is_read(session: TextGenerator) -> None:
    out, written = io.BytesIO(), []

    def lines() -> Iterator[Any]:
        for line in read_lines(io.BytesIO(b"a film\na plot\n"), "text", PROMPTS):
            written.append(out.getvalue().count(b"\n"))
            yield line

    write_answers(session, lines(), Output(out), max_new_tokens=2, as_it_comes=False)
    assert written == [0, 1] and out.getvalue().count(b"\n") == 2


def test_report_without_answers(session: TextGenerator) -> None:
    _, failed, report = answers(session)
    assert failed == 0 and report.splitlines() == ["answers    0, 0 with errors", "tokens     0 (0.0/s)"]


def test_stats_of_speculative_name_drafts_and_what_ran() -> None:
    options = ("--rule", "speculative", "--stats", "--max-new-tokens", "12")
    code, objects, errors = run(*options, data=f"{PROMPT}\na film\n")
    assert code == cli.ALL_ANSWERED and [value["tokens"] for value in objects] == [12, 12]
    assert all(value["depth"] == 3 and value["blocks_run"] >= 3 for value in objects)
    for line in (
        "answers    2, 0 with errors",
        "tokens     24 (",
        "mean depth 3.00 of 3, ",
        "blocks run a token",
        "steps without a draft",
        "rule       speculative",
        "engine     ort",
    ):
        assert line in errors


def test_wrong_options_prevent_the_start() -> None:
    for options, message in (
        (("--rule", "quee"), "it is not for text-generation"),
        (("--exit-kv", "propagate", "--rule", "never"), "no token exits early"),
        (("--engine", "trt"), "run on engine ort alone"),
        (("one.txt", "two.txt"), "name one INPUT, not 2"),
        (("--temperature", "-1"), "temperature -1.0: expected a number from 0 to 100"),
        (("--top-p", "0.9"), "give temperature as well"),
    ):
        code, objects, errors = run(*options, data="a\n")
        assert (code, objects) == (cli.NOT_STARTED, []) and errors.startswith("ee-run: ")
        assert message in errors and errors.count("\n") == 1
