"""Reading lines: each becomes one Line, with its problem where it has one."""

import io

import pytest

from offramp.runtime.inputs import lines
from offramp.runtime.inputs.lines import Line, read_lines


def read(data: bytes, form: str = "auto") -> list[Line]:
    return list(read_lines(io.BytesIO(data), form))


def test_read_plain_text() -> None:
    assert read(b"one\ntwo\r\nna\xc3\xafve") == [Line(1, "one"), Line(2, "two"), Line(3, "naïve")]


def test_read_no_lines() -> None:
    assert read(b"") == []


def test_read_json_lines_with_and_without_text_b() -> None:
    lines_read = read(
        b'{"text": "a", "label": 1}\n{"text": "b", "text_b": "c"}\n{"text": "d", "text_b": null}\n'
    )
    assert [line.item for line in lines_read] == ["a", ("b", "c"), "d"]


def test_first_line_with_content_sets_the_format() -> None:
    lines_read = read(b'\n  \n{"text": "a"}\nplain\n')
    assert lines_read[2] == Line(3, "a")
    assert str(lines_read[3].problem).startswith("not JSON") and "say --format text" in str(
        lines_read[3].problem
    )
    assert read(b'plain\n{"text": "a"}\n')[1] == Line(2, '{"text": "a"}')


def test_first_line_that_only_begins_like_json() -> None:
    assert "not JSON" in str(read(b"{bad\n")[0].problem)
    assert read(b"{bad\n", "text") == [Line(1, "{bad")]


def test_empty_lines_keep_their_number() -> None:
    assert [(line.number, line.problem) for line in read(b"a\n\n \t\nb\n")] == [
        (1, None),
        (2, "empty line"),
        (3, "empty line"),
        (4, None),
    ]


def test_byte_order_mark_is_removed() -> None:
    assert read(b"\xef\xbb\xbfone\n") == [Line(1, "one")]
    assert read(b'\xef\xbb\xbf{"text": "a"}\n')[0].text == "a"


def test_bad_utf8_names_the_byte() -> None:
    assert read(b"good\nba\xffd\n")[1].problem == "not UTF-8 at byte 3: invalid start byte"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"[1]", "expected a JSON object"),
        (b'{"txt": "a"}', '"text": expected a string, found nothing'),
        (b'{"text": 3}', '"text": expected a string, found int'),
        (b'{"text": "a", "text_b": 3}', '"text_b": expected a string, found int'),
        (b'{"text": " "}', '"text" is empty'),
        (b'{"text": "\\ud83d"}', "surrogate"),
        (b"{" * 200_000, "not JSON"),
    ],
)
def test_bad_json_line_has_its_problem(line: bytes, problem: str) -> None:
    (bad_line,) = read(line, "json")
    assert bad_line.problem is not None and problem in bad_line.problem


def test_surrogate_pair_is_one_character() -> None:
    assert read(b'{"text": "\\ud83d\\ude00"}')[0].text == "😀"


def test_too_long_line_is_cut_and_the_next_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 10)
    lines_read = read("aaaaaaaaaé and far more than that\nnext\n".encode())
    assert lines_read == [Line(1, "a" * 9, cut=True), Line(2, "next")]
    assert read(b"0123456789\nnext\n") == [Line(1, "0123456789"), Line(2, "next")]
    assert read(b'{"text": "0123456789"}\n{}\n')[0].problem == "a JSON line of more than 10 bytes"


def test_lines_are_read_one_at_a_time() -> None:
    class Pipe(io.BytesIO):
        reads = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            self.reads += 1
            return super().readline(-1 if size is None else size)

    pipe = Pipe(b"one\ntwo\nthree\n")
    source = read_lines(pipe)
    assert next(source).text == "one" and pipe.reads == 1
