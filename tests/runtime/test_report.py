"""The table and the page: all figures are in them, nothing is loaded, no name is read as markup."""

import copy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from offramp.runtime import BadSetting
from offramp.runtime.tuning import report
from offramp.runtime.tuning.bench import measure_classifier

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data"
EVIL = "<script>alert(1)</script> & $x_1$"


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    data = tmp_path_factory.mktemp("report") / "data.jsonl"
    data.write_text('{"text": "good film", "label": 1}\n{"text": "bad plot", "label": 0}\n', encoding="utf-8")
    return measure_classifier(
        DATA / "tiny_bundle", data, baselines=DATA / "tiny_baselines", rounds=1, starts=1
    )


@pytest.fixture(scope="module")
def page(figures: dict[str, Any]) -> str:
    """The page of these figures: drawing its pictures takes most of a second."""
    return report.html_page(figures)


def test_the_table_has_every_candidate_segment_and_fact(figures: dict[str, Any]) -> None:
    lines = report.classification_text(figures).splitlines()
    assert lines[0].split()[0] == "candidate"
    starts = [
        candidate["name"]
        for candidate in (*figures["candidates"], *figures["segments"], *figures["cold_start"])
    ]
    for name in (*starts, "cpu", "python", "onnxruntime", "threads", "pool", "budget ms", "reference"):
        assert any(line.startswith(name) for line in lines), name
    assert "rows           2 of 2" in lines


def test_a_missing_value_is_a_dash(figures: dict[str, Any]) -> None:
    changed = copy.deepcopy(figures)
    for candidate in changed["candidates"]:
        candidate["accuracy"] = None
    assert all(row[report.COLUMNS.index("accuracy")] == "-" for row in report.candidate_rows(changed))
    assert "no labels" in report.html_page(changed)


def test_the_page_is_complete_in_itself(figures: dict[str, Any], page: str) -> None:
    parsed = Page(page)
    names = [tag for tag, _ in parsed.tags]
    assert names.count("svg") == names.count("figure") == 4
    assert not {"script", "link", "img", "iframe", "image"} & set(names)
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "clip-path", "fill"):
                assert "//" not in str(value), f"{tag} {name} loads {value}"
    text = "".join(parsed.words)
    assert "@import" not in text and "url(http" not in text
    assert all(candidate["name"] in text for candidate in figures["candidates"])


def test_pictures_do_not_share_ids(page: str) -> None:
    tags = Page(page).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 100
    links = [str(a["xlink:href"]) for _, a in tags if "xlink:href" in a]
    assert links and {link.removeprefix("#") for link in links} <= set(ids)


def test_ink_follows_the_page(page: str) -> None:
    assert "currentColor" in page and report._INK not in page
    assert "prefers-color-scheme: dark" in page


def test_names_are_escaped_everywhere(figures: dict[str, Any]) -> None:
    changed = copy.deepcopy(figures)
    changed["candidates"][0]["name"] = EVIL
    for name in ("data", "bundle", "reference", "cpu"):
        changed["about"][name] = EVIL
    page = Page(report.html_page(changed))
    assert "script" not in [tag for tag, _ in page.tags]
    assert "".join(page.words).count(EVIL) >= 6


def test_many_candidates(figures: dict[str, Any]) -> None:
    changed = copy.deepcopy(figures)
    changed["candidates"] = [
        {**candidate, "name": f"{candidate['name']} {k}"}
        for k in range(3)
        for candidate in figures["candidates"]
    ]
    assert report.html_page(changed).count("<svg") == 4


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    report.write_atomically(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    with pytest.raises(UnicodeEncodeError):
        report.write_atomically(path, "half \udcff")
    assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_targets_are_checked_before(tmp_path: Path) -> None:
    report.check_output_files(tmp_path / "out.json", tmp_path / "out.html")
    with pytest.raises(BadSetting, match="is a folder"):
        report.check_output_files(tmp_path, None)
    with pytest.raises(BadSetting, match="there is no folder"):
        report.check_output_files(None, tmp_path / "none" / "out.html")


def test_without_matplotlib_the_error_names_the_package(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
sys.modules["matplotlib"] = None
from offramp.runtime.tuning import report
from offramp.runtime import EngineUnavailable
report.check_output_files(Path({str(tmp_path)!r}) / "out.json", None)
try:
    report.check_output_files(None, Path({str(tmp_path)!r}) / "out.html")
except EngineUnavailable as problem:
    print(problem)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'offramp[bench]'" in done.stdout
