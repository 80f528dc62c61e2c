"""Read pages of Markdown for tests: their fenced blocks, links and headings."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTRIBUTING = ROOT / ".github" / "CONTRIBUTING.md"
KINDS = ("sh", "python", "yaml")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. A test runs it, unless a marker before the block says what is missing."""

    kind: str
    text: str
    line: int
    needs: str
    """The text REASON of the marker `<!-- needs: REASON -->` before the block; empty without a marker."""

    @property
    def file(self) -> str:
        """The name of the file that the block shows, from a comment in its first line; empty if there is none."""
        match = re.match(r"# ([\w./]+\.(?:py|ya?ml))$", self.text.partition("\n")[0])
        return match[1] if match else ""


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page that hold commands, Python or YAML."""
    needs, kind, start, text = "", "", 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if kind:
            if line.strip() != "```":
                text.append(line)
                continue
            if kind in KINDS:
                yield Block(kind, "\n".join(text), start, needs)
            needs, kind = "", ""
        elif line.startswith("```"):
            kind, start, text = line[3:].strip() or "text", number, []
        elif marker := re.fullmatch(r"<!-- needs: (.+) -->", line):
            needs = marker[1]
        elif line.strip():
            needs = ""
    assert not kind, f"{page}:{start}: a fenced block has no closing line"


def commands(block: Block) -> list[str]:
    """Return the commands of a block of `sh`, one string each, without comments and line continuations."""
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in block.text.replace("\\\n", " ").splitlines())
    return [re.sub(r"\s+", " ", line) for line in lines if line]


def prose(page: Path) -> str:
    """Return the text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """Return the targets of the links and images of a page."""
    text = re.sub(r"`[^`\n]*`", "", prose(page))
    return re.findall(r"\]\(([^)\s]+)\)", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as code hosts make them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def example(name: str, page: Path = CONTRIBUTING) -> str:
    """Return the fenced block that shows the file `name`."""
    (text,) = [block.text for block in blocks(page) if block.file == name]
    return text + "\n"


def install(folder: Path, package: str, group: str, **more: str) -> None:
    """Write metadata of a made-up package: the entry points of `group` in CONTRIBUTING.md, and those in `more`."""
    shown = re.findall(r"^```toml\n(.*?)^```$", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    points = [tomllib.loads(text)["project"]["entry-points"] for text in shown]
    (named,) = [point[group] for point in points if group in point]
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {place}" for name, place in {**named, **more}.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]) + "\n")
