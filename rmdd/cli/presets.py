"""The command `rmdd presets`: lists the presets (run files that come with rmdd), and prints one of them."""

from itertools import takewhile
from typing import Annotated

import typer
from rich.table import Table

from rmdd import config
from rmdd.cli.command import Output, command, presets_from
from rmdd.cli.console import TABLE_WIDTH
from rmdd.cli.table import FittedTable
from rmdd.config.presets import PRESETS, find_preset, no_preset, preset, preset_files


@command(options=())
def presets(
    name: Annotated[
        str | None,
        typer.Argument(help="Dataset to list, or a preset or preset file to print.", autocompletion=presets_from),
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Add the fields from presets that it extends.")] = False,
) -> Output:
    """List the presets (run files that come with rmdd), or print one."""
    files = preset_files()
    datasets = {_dataset(file) for file in files}
    if name is None or (name in datasets and name not in files):
        return Output(lines=[_table({file: keys for file, keys in files.items() if name in (None, _dataset(file))})])
    if whole:
        return Output(lines=[config.as_yaml(config.read(name)).rstrip()])
    if find_preset(name) is not None:
        return Output(lines=[run_file(name)])
    file = PRESETS / f"{name}.yaml"
    if name in files or (name.startswith("bases/") and file.is_file()):
        return Output(lines=[file.read_text(encoding="utf-8").rstrip()])
    raise config.ConfigError([no_preset(name)], "presets")


def run_file(name: str) -> str:
    """Return the run file of a preset as text: those lines of its preset file that belong to this preset."""
    place, values = find_preset(name), preset(name)
    assert place is not None and values is not None, name
    path, key = place
    text = path.read_text(encoding="utf-8").rstrip()
    if not key:
        return text
    lines = text.splitlines()
    head = list(takewhile(lambda line: line.startswith("#"), lines))
    common = _blocks(lines[len(head) :])
    entries = _blocks(_inner(common.pop("budgets")))
    sections = _blocks(_inner(entries[key]))
    another = "".join(sections.pop("extends", [""])).removeprefix("extends: ")
    if another not in entries:  # an entry of this file already has the common fields
        sections = _blocks(_merged(_lines(common), _lines(sections)))
        sections.pop("extends", None)
    *notes, line = _opening(entries[key])
    notes += [f"# {note}" for note in line.split(" # ")[1:]]
    notes[:1] = [f"# {key}: {note[2:]}" for note in notes[:1]]
    top = [*head, *notes, *([f"extends: {values['extends']}"] if "extends" in values else []), f"name: {name}"]
    return "\n\n".join("\n".join(block) for block in (top, *sections.values()))


def _table(files: dict[str, list[str]]) -> Table:
    """Return a table with a section per dataset and a row per preset file; each row lists the budgets of its file."""
    caption = (
        "A preset is a file and a budget, such as flickr30k_lors_500.\n"
        "rmdd presets DATASET lists one dataset, rmdd presets FILE prints a file,\n"
        "rmdd presets PRESET prints one run file."
    )
    table = FittedTable(caption=caption, caption_justify="left", most=TABLE_WIDTH)
    table.add_column("file", no_wrap=True)
    table.add_column("budgets and variants", ratio=1)
    previous = None
    for file, keys in files.items():
        if previous not in (None, _dataset(file)):
            table.add_section()
        previous = _dataset(file)
        table.add_row(file, ", ".join(keys) or "- (the file is one preset)")
    return table


def _dataset(file: str) -> str:
    return file.partition("_")[0]


def _merged(below: list[str], above: list[str]) -> list[str]:
    """Merge the lines of two YAML mappings, also of nested ones; for a key in both, the value is from `above`."""
    merged = _blocks(below)
    for key, block in _blocks(above).items():
        old = merged.get(key, [])
        nested = _inner(old) and _inner(block) and not _inner(block)[0].startswith("-")
        inner = [f"  {line}" for line in _merged(_inner(old), _inner(block))] if nested else []
        merged[key] = [*_opening(old), *inner] if nested else block
    return _lines(merged)


def _lines(blocks: dict[str, list[str]]) -> list[str]:
    return [line for block in blocks.values() for line in block]


def _blocks(lines: list[str]) -> dict[str, list[str]]:
    """Return the lines of a YAML mapping by key: comments above the key, the line of the key, and its value below."""
    blocks: dict[str, list[str]] = {}
    comments: list[str] = []
    key = ""
    for line in filter(str.strip, lines):
        if line.startswith("#"):
            comments.append(line)
        elif line.startswith(" "):
            blocks[key].append(line)
        else:
            key = line.partition(":")[0]
            blocks[key], comments = [*comments, line], []
    return blocks


def _opening(block: list[str]) -> list[str]:
    """Return the first lines of a block that `_blocks` returned: comments and the line of the key."""
    return [line for line in block if not line.startswith(" ")]


def _inner(block: list[str]) -> list[str]:
    """Return the value in `block` (a result of `_blocks`) as lines, each with two spaces less of indentation."""
    return [line[2:] for line in block if line.startswith(" ")]
