"""The command `rmdd docs`: lists the pages of the manual, and shows one in the terminal."""

import difflib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rmdd import config
from rmdd.cli.command import Output, command

FOLDER = Path(config.__file__).parents[1] / "docs"
ORDER = (
    *("quickstart", "data", "runfiles", "methods", "evaluation", "search", "coresets", "storage", "ray"),
    *("performance", "results", "troubleshooting", "api"),
)
"""Names of the pages that are listed first, in this order; the other pages follow in alphabetical order."""


def pages() -> dict[str, Path]:
    """Return the path of every page of the manual, by the name of the page, such as `data` or `methods/lors`."""
    files = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in FOLDER.rglob("*.md")}
    places = {name: place for place, name in enumerate(ORDER)}
    return {name: files[name] for name in sorted(files, key=lambda name: (places.get(name, len(ORDER)), name))}


def title(path: Path) -> str:
    """Return the heading of a page, which is its first line."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("# ").strip()


@command(options=())
def docs(page: Annotated[str | None, typer.Argument(help="Page to show, such as data or lors.")] = None) -> Output:
    """List the pages of the manual, or show one page."""
    files = pages()
    if page is None:
        width = max(map(len, files))
        return Output(lines=[f"{name:<{width}}  {title(path)}" for name, path in files.items()])
    name = page.removesuffix(".md")
    name = name if name in files else f"methods/{name}"
    if name not in files:
        raise config.ConfigError([_unknown(page, list(files))], "docs")
    text = files[name].read_text(encoding="utf-8").rstrip()
    return Output(lines=[_rendered(text) if sys.stdout.isatty() else text])


def _unknown(page: str, names: list[str]) -> str:
    """Return the error message for a page that does not exist; it suggests the pages with the closest names."""
    by_stem = {name.rpartition("/")[2]: name for name in reversed(names)}
    close = difflib.get_close_matches(page, [*names, *by_stem])
    matches = dict.fromkeys(by_stem.get(match, match) for match in close)
    hint = f"did you mean {' or '.join(matches)}?" if matches else "`rmdd docs` lists all pages"
    return f"unknown page '{page}'; {hint}"


def _rendered(text: str) -> Any:
    from rich.markdown import Markdown  # parsers of Markdown and of colours take a tenth of a second to import

    return Markdown(text, hyperlinks=False)
