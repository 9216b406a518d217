"""The project's documents, taken apart: code blocks, code in the text, links, headings and tables of Markdown files."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"\s#\s.*$")


@dataclass(frozen=True)
class Document:
    """A Markdown file of the repository."""

    path: Path

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def prose(self) -> str:
        """The text without its code blocks."""
        return FENCE.sub("", self.text)

    def blocks(self, *languages: str) -> list[str]:
        """The code blocks in some languages, not indented."""
        found = [(language, indent, code) for indent, language, code in FENCE.findall(self.text)]
        return [re.sub(f"^{indent}", "", code, flags=re.M) for language, indent, code in found if language in languages]

    @cached_property
    def code(self) -> list[str]:
        """The pieces of code in the text, as `this`."""
        return [re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`]+)`", self.prose)]

    @cached_property
    def commands(self) -> list[str]:
        """The lines of the shell blocks, without comments."""
        lines = "".join(self.blocks("sh")).splitlines()
        return [line for line in (COMMENT.sub("", line).strip() for line in lines) if line and not line.startswith("#")]

    @cached_property
    def links(self) -> list[str]:
        """The targets of links and pictures."""
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    @cached_property
    def anchors(self) -> set[str]:
        """The names by which GitHub links to the headings."""
        titles = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}

    def section(self, title: str) -> str:
        """What stands below a heading, up to the next heading of its level or a higher one."""
        level = re.search(rf"^(#+) {re.escape(title)}$", self.text, re.MULTILINE)
        assert level, f"{self}: there is no heading {title!r}"
        rest = self.text[level.end() :]
        end = re.search(rf"^#{{1,{len(level[1])}}} ", rest, re.MULTILINE)
        return rest[: end.start()] if end else rest

    def table(self, title: str) -> list[list[str]]:
        """The rows of the first table of a section, without the header; cells without emphasis."""
        return table(self.section(title))


def table(text: str) -> list[list[str]]:
    """The rows of the first table of a text, without its header; cells without emphasis."""
    found = re.search(r"^\|.*\|\n\|[-|: ]+\|\n((?:\|.*\|\n)+)", text, re.MULTILINE)
    assert found, "there is no table"
    rows = (re.split(r"(?<!\\)\|", line)[1:-1] for line in found[1].splitlines())
    return [[cell.replace("**", "").strip() for cell in row] for row in rows]


def document(name: str) -> Document:
    """The document at a path in the repository."""
    return Document(ROOT / name)


DOCUMENTS = [
    Document(path)
    for pattern in ("*.md", "docs/*.md", "Testing/*.md", "training/*.md")
    for path in sorted(ROOT.glob(pattern))
]
