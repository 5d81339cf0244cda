"""Hooks of the docs site: pages from outside docs/, links that leave docs/, lists as CommonMark has them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("benchmarks", "export", "models", "runtime", "training")
# Pages of the site from files outside docs/: path in the repository -> path in the site.
OUTSIDE = {
    "README.md": "readme.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "native/README.md": "native.md",
    "web/README.md": "web.md",
}
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!--.*?-->\n?")
LIST_ITEM = re.compile(r"[-*] |1\. ")
NESTED_ITEM = re.compile(r"^ {2,3}(?=(?:[-*]|\d+\.) )")
LANGUAGES = {".py": "python", ".js": "javascript", ".mjs": "javascript", ".json": "json", ".yaml": "yaml"}


def outside_code(markdown: str) -> Iterator[tuple[bool, str]]:
    """(is code, part) for the fenced blocks of a page and what is between them, in order."""
    end = 0
    for block in FENCE.finditer(markdown):
        yield False, markdown[end : block.start()]
        yield True, block.group()
        end = block.end()
    yield False, markdown[end:]


def origin_of(site_path: str) -> str:
    """The path in the repository of a page of the site."""
    by_page = {page: origin for origin, page in OUTSIDE.items()}
    return by_page.get(site_path, f"docs/{site_path}")


def page_of(repository_path: str) -> str:
    """The path in the site of a file of the repository."""
    if repository_path.startswith("docs/"):
        return repository_path.removeprefix("docs/")
    return OUTSIDE.get(repository_path, f"source/{repository_path}.md")


def link_target(origin: str, link: str) -> str | None:
    """The path in the repository of the file that a link of page `origin` leads to; None if it is none."""
    if "://" in link or link.startswith(("mailto:", "/")):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return target if (ROOT / target).is_file() else None


def rewrite_links(markdown: str, site_path: str) -> str:
    """Let the links of a page lead to pages of the site, where they lead to files of the repository."""
    origin = origin_of(site_path)

    def rewritten(match: re.Match[str]) -> str:
        target = link_target(origin, match[1])
        if target is None:
            return match.group()
        path = posixpath.relpath(page_of(target), posixpath.dirname(site_path) or ".")
        return f"]({path}{match[2] or ''})"

    return "".join(part if code else LINK.sub(rewritten, part) for code, part in outside_code(markdown))


def separate_lists(markdown: str) -> str:
    """Put an empty line before a list that follows a paragraph's last line, and before an item that follows a
    list within the item before it; indent the items of the latter by 4.

    CommonMark, by which the repository's pages are shown elsewhere, begins a list or an item there;
    Python-Markdown, by which the site is made, goes on with what was before.
    """
    lines: list[str] = []
    in_paragraph = after_nested = False
    for line in markdown.split("\n"):
        if LIST_ITEM.match(line):
            if in_paragraph or after_nested:
                lines.append("")
            in_paragraph = after_nested = False
        elif NESTED_ITEM.match(line):
            after_nested = True
        elif not lines or not lines[-1].strip():
            in_paragraph = bool(line.strip()) and not line[0].isspace()
        lines.append(NESTED_ITEM.sub("    ", line))
    return "\n".join(lines)


def source_page(path: str) -> str:
    """A page that shows a source file of the repository."""
    language = LANGUAGES.get(posixpath.splitext(path)[1], "text")
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"# {posixpath.basename(path)}\n\n`{path}`\n\n~~~~~{language}\n{text}\n~~~~~\n"


def on_config(config: MkDocsConfig) -> None:
    """Lay links to the packages under their import names, as `make build/types` does, for mkdocstrings."""
    folder = ROOT / "build" / "types" / "offramp"
    folder.mkdir(parents=True, exist_ok=True)
    for room in ROOMS:
        if not (folder / room).exists():
            (folder / room).symlink_to(ROOT / room)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of OUTSIDE, and a page for every source file that a page links to."""
    for origin, path in OUTSIDE.items():
        files.append(File.generated(config, path, content=(ROOT / origin).read_text(encoding="utf-8")))
    linked = set()
    for file in files.documentation_pages():
        for code, part in outside_code(file.content_string):
            targets = (link_target(origin_of(file.src_uri), link[1]) for link in LINK.finditer(part))
            linked |= set() if code else {target for target in targets if target}
    for target in sorted(linked):
        page = page_of(target)
        if page.startswith("source/"):
            content, level = source_page(target), InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, page, content=content, inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links, separate lists, and drop comments, which are for tests and for what writes the docs."""
    parts = outside_code(rewrite_links(markdown, page.file.src_uri))
    return "".join(part if code else separate_lists(COMMENT.sub("", part)) for code, part in parts)
