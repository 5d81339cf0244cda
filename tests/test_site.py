"""The docs site: it builds without a warning, has every page, fetches nothing, shows what the files say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from documents import ROOT
from markdown_it import MarkdownIt

import offramp.runtime

DOCS = ROOT / "docs"
# Elements that a browser fetches something for, and the attributes that say from where.
FETCHING = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "object": "data",
    "embed": "src",
    "video": "src",
    "audio": "src",
}
# Of them, those that only name an address.
NAMING = {"canonical", "prev", "next", "alternate"}
COUNTED = ("li", "table", "tr", "pre", "h1", "h2", "h3", "h4", "img")


@cache
def hooks() -> ModuleType:
    """docs/site_hooks.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Elements(HTMLParser):
    """Every start tag of a page, with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def counts(self) -> Counter[str]:
        return Counter(tag for tag, _ in self.tags if tag in COUNTED)


def nav_pages() -> list[str]:
    """Pages that the navigation of mkdocs.yml names."""
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for value in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from pages(value)

    return list(pages(settings["nav"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def article(site: Path, page: str) -> str:
    """The HTML of a page's text."""
    html = (site / page).with_suffix(".html").read_text(encoding="utf-8")
    return html[html.index("<article") : html.index("</article>")]


@pytest.mark.slow
def test_every_page_is_in_the_navigation_once() -> None:
    written = {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")}
    assert sorted(nav_pages()) == sorted(written | set(hooks().OUTSIDE.values()))


def test_links_of_tutorials_lead_to_files() -> None:
    broken = []
    for file in sorted((DOCS / "tutorials").glob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8")):
            if "://" not in link and not (file.parent / link).exists():
                broken.append(f"{file.name}: {link}")
    assert broken == []


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("hub.md", "../SECURITY.md", "security.md"),
        ("hub.md", "../SECURITY.md#threats", "security.md#threats"),
        ("hub.md", "gpu.md", "gpu.md"),
        ("hub.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("hub.md", "../nowhere.md", "../nowhere.md"),  # mkdocs then warns
        ("security.md", "docs/gpu.md", "gpu.md"),
        ("web.md", "../docs/bundle-format.md", "bundle-format.md"),
        ("tutorials/serve.md", "../serving.md", "../serving.md"),
        ("tutorials/serve.md", "../../SECURITY.md", "../security.md"),
        ("processes.md", "../benchmarks/pools.py", "source/benchmarks/pools.py.md"),
    ],
)
def test_links_lead_to_pages_of_the_site(page: str, link: str, expected: str) -> None:
    assert hooks().rewrite_links(f"[words]({link})", page) == f"[words]({expected})"


def test_links_in_code_stay() -> None:
    code = "```\n[words](../SECURITY.md)\n```\n"
    assert hooks().rewrite_links(code, "hub.md") == code


def test_a_list_after_a_paragraph_is_set_apart() -> None:
    assert hooks().separate_lists("words:\n- one\n- two") == "words:\n\n- one\n- two"
    assert hooks().separate_lists("- one\n  more\n- two") == "- one\n  more\n- two"
    assert hooks().separate_lists("- one:\n  1. a\n- two") == "- one:\n    1. a\n\n- two"


@pytest.mark.slow  # builds the site
def test_the_site_builds_without_a_warning(site: Path) -> None:
    assert (site / "index.html").is_file()
    assert (site / "source" / "benchmarks" / "pools.py.html").is_file()


@pytest.mark.slow
def test_the_site_fetches_nothing_from_other_servers(site: Path) -> None:
    outside = []
    for file in site.rglob("*.html"):
        for tag, attributes in Elements(file.read_text(encoding="utf-8")).tags:
            address = attributes.get(FETCHING.get(tag, "")) or ""
            names = set((attributes.get("rel") or "").split()) & NAMING
            if re.match(r"(https?:)?//", address) and not names:
                outside.append(f"{file.relative_to(site)}: {tag} {address}")
    for file in site.rglob("*.css"):
        fetched = re.findall(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]+)", file.read_text("utf-8"))
        outside += [f"{file.relative_to(site)}: {address}" for address in fetched]
    assert outside == []


@pytest.mark.slow
def test_the_site_shows_what_the_files_say(site: Path) -> None:
    """As many headings, items, rows and blocks of code as by CommonMark, which other readers go by."""
    commonmark = MarkdownIt("commonmark").enable("table")
    origins = {file.relative_to(DOCS).as_posix(): file for file in DOCS.rglob("*.md")}
    origins |= {page: ROOT / origin for origin, page in hooks().OUTSIDE.items()}
    different = {}
    for page, origin in origins.items():
        if page == "api.md":  # most of it is generated
            continue
        expected = Elements(commonmark.render(origin.read_text(encoding="utf-8"))).counts()
        shown = Elements(article(site, page)).counts()
        if shown != expected:
            different[page] = {tag: (expected[tag], shown[tag]) for tag in COUNTED}
    assert different == {}


@pytest.mark.slow
def test_the_python_page_has_every_public_name(site: Path) -> None:
    ids = {attributes.get("id") for _, attributes in Elements(article(site, "api.md")).tags}
    missing = [name for name in offramp.runtime.__all__ if f"offramp.runtime.{name}" not in ids]
    assert missing == []


@pytest.mark.slow
def test_comments_of_the_tests_are_not_in_the_site(site: Path) -> None:
    assert "block:" not in article(site, "tutorials/serve.md")
