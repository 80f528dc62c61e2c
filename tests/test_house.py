"""Check the structure of the package from its source code.

All imports count: at the top of a file, inside a function, or under `TYPE_CHECKING`.
"""

import ast
import collections
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rmdd"
SOURCES = {p.relative_to(ROOT).with_suffix(""): ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}
MODULES = {".".join(path.parts).removesuffix(".__init__"): tree for path, tree in SOURCES.items()}
RAY = {name for name in MODULES if name == "rmdd.execution.ray" or name.startswith("rmdd.execution.ray.")}

ROOMS: dict[str, list[str]] = {
    "rmdd": "cli searches comparisons pipeline artefact retrieval core config".split(),
    "cli": (
        "doctor inventory bench analyse searches comparisons pipeline report runs methods evaluate artefact retrieval "
        "core config"
    ).split(),
    "bench": "pipeline methods distill experts models core config".split(),
    "analyse": (
        "searches comparisons pipeline report runs methods evaluate distill experts models execution core config"
    ).split(),
    "doctor": "core config".split(),
    "inventory": "searches comparisons runs methods artefact distill models data core config".split(),
    "searches": (
        "comparisons pipeline report runs methods evaluate artefact retrieval distill models execution core config"
    ).split(),
    "comparisons": (
        "pipeline runs generate evaluate artefact retrieval distill experts coresets models data execution core config"
    ).split(),
    "pipeline": "report runs artefact distill experts models data execution core config".split(),
    "report": "runs methods artefact distill experts data core config".split(),
    "runs": "methods generate evaluate artefact distill experts coresets models data execution core config".split(),
    "methods": "generate distill experts models data execution core config".split(),
    "generate": "distill experts coresets models data execution core config".split(),
    "evaluate": "artefact distill models data execution core config".split(),
    "artefact": "distill models data core config".split(),
    "retrieval": "models data core config".split(),
    "distill": "experts coresets models data execution core config".split(),
    "experts": "coresets models data execution core config".split(),
    "coresets": "models data execution core config".split(),
    "models": "data execution core config".split(),
    "data": "execution core config".split(),
    "execution": "core config".split(),
    "core": "config".split(),
    "config": [],
}
"""The packages that each package may import; a package imports only those listed after it."""

LAZY_IMPORTS = 44
"""Largest number of imports of rmdd modules inside functions; such imports keep `import rmdd` and the CLI fast."""
WHOLE_RUN = 60
"""At most this many functions may take a complete `Run`; those in `runs`, `cli` and the pipeline are not counted."""
LINES = 450

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def imported(tree: ast.AST) -> Iterator[str]:
    """Return the full names of all imports in `tree`; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree: ast.AST) -> set[str]:
    """Return the modules of this package that `tree` imports; `from a import b` counts as a.b if that is a module."""
    result = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            result |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            result |= {name if name in MODULES else str(node.module) for name in names}
    return result & MODULES.keys()


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(module: str) -> str:
    """Return the second part of a module's name (`data` for `rmdd.data.plan`), and `rmdd` for the package itself."""
    parts = module.split(".")
    return "rmdd" if len(parts) == 1 or parts[1] == "__main__" else parts[1]


IMPORTS = {module: ours(tree) for module, tree in MODULES.items()}


def circles(edges: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Return cycles in the import graph: strongly connected components of more than one node, found in two passes."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(node: str, along: Mapping[str, Collection[str]], into: list[str]) -> None:
        stack = [(node, iter(sorted(along[node])))]
        seen.add(node)
        while stack:
            here, rest = stack[-1]
            step = next((n for n in rest if n not in seen), None)
            if step is None:
                into.append(here)
                stack.pop()
            else:
                seen.add(step)
                stack.append((step, iter(sorted(along[step]))))

    back: dict[str, set[str]] = collections.defaultdict(set)
    for node, targets in edges.items():
        for target in targets:
            back[target].add(node)
    for node in edges:
        if node not in seen:
            visit(node, edges, order)
    seen.clear()
    groups = []
    for node in reversed(order):
        if node not in seen:
            group: list[str] = []
            visit(node, back, group)
            groups.append(sorted(group))
    return [group for group in groups if len(group) > 1]


def test_the_scan_sees_the_package():
    assert {"rmdd", "rmdd.pipeline", "rmdd.execution.ray.actors", "rmdd.distill.unroll"} <= MODULES.keys()
    assert any(within(name, "ray") for name in imported(MODULES["rmdd.execution.ray.stream"]))
    lazy = ast.parse("def f():\n    from rmdd import pipeline\nif TYPE_CHECKING:\n    from rmdd.config import Run")
    assert ours(lazy) == {"rmdd.pipeline", "rmdd.config"}


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def test_there_are_no_import_cycles():
    assert circles(IMPORTS) == []


def test_rooms_import_only_rooms_below_them():
    assert {room_of(module) for module in MODULES} == ROOMS.keys(), "every package is listed in ROOMS"
    below = list(ROOMS)
    assert all(below.index(target) > below.index(room) for room, targets in ROOMS.items() for target in targets)
    wrong = {
        f"{module} -> {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        if room_of(target) not in [room_of(module), *ROOMS[room_of(module)]]
    }
    assert wrong == set()


def test_the_root_holds_the_pipeline_alone():
    assert {p.name for p in PACKAGE.iterdir() if p.is_file()} == {
        "__init__.py",
        "__main__.py",
        "pipeline.py",
        "py.typed",
    }


def test_imports_stand_at_the_top():
    lazy = [
        f"{module}:{node.lineno}"
        for module, tree in MODULES.items()
        for node in {n for f in ast.walk(tree) if isinstance(f, FUNCTIONS) for n in ast.walk(f)}
        if isinstance(node, ast.Import | ast.ImportFrom) and ours(node)
    ]
    assert len(lazy) <= LAZY_IMPORTS, "\n".join(sorted(lazy))


def takes_a_run(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    names = {
        ast.unparse(part)
        for argument in arguments
        if argument.annotation is not None
        for part in ast.walk(argument.annotation)
        if isinstance(part, ast.Name | ast.Attribute)
    }
    return bool(names & {"config.Run", "Run"})


def test_functions_take_what_they_read():
    taking = [
        f"{module}.{node.name}"
        for module, tree in MODULES.items()
        if room_of(module) not in ("runs", "pipeline", "cli")
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS) and takes_a_run(node)
    ]
    assert len(taking) <= WHOLE_RUN, "\n".join(taking)


def test_only_methods_know_their_family():
    """Outside `rmdd.methods`, code must not branch on a distillation method's family; it may only show the family."""
    asking = []
    for module, tree in MODULES.items():
        shown = {id(value) for node in ast.walk(tree) if isinstance(node, ast.Dict) for value in node.values}
        asking += [
            f"{module}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and node.attr == "family" and id(node) not in shown
        ]
    assert asking == []


def test_no_two_public_classes_share_a_name():
    where = collections.defaultdict(list)
    for module, tree in MODULES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(module)
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


FOREIGN_MESSAGES = {"rmdd.models.image", "rmdd.execution.ray.cluster", "rmdd.execution.ray.actors"}
"""Modules that may recognise errors of timm or Ray by their texts, because the error classes are too general."""


def test_errors_are_distinguished_by_their_class():
    """The code must recognise errors by their class, not by the name of the class or by words of the message."""
    wrong = []
    for module, tree in MODULES.items():
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.Compare)):
            parts = [ast.unparse(part) for part in (node.left, *node.comparators)]
            by_name = any(part.endswith((").__name__", ".__class__.__name__")) for part in parts)
            by_text = isinstance(node.ops[0], ast.In | ast.NotIn) and any(p.startswith("str(e") for p in parts[1:])
            if by_name or (by_text and module not in FOREIGN_MESSAGES):
                wrong.append(f"{module}:{node.lineno}")
    assert wrong == []


@pytest.mark.parametrize("module", sorted(MODULES.keys() - RAY))
def test_only_the_ray_room_imports_ray(module):
    assert [name for name in imported(MODULES[module]) if within(name, "ray")] == []


def test_only_the_backend_imports_the_ray_room_and_only_inside_functions():
    for module in MODULES.keys() - RAY:
        top = {node for node in ast.walk(MODULES[module]) if not isinstance(node, FUNCTIONS)}
        lazy = {n for f in ast.walk(MODULES[module]) if isinstance(f, FUNCTIONS) for n in ast.walk(f)}
        nodes = [
            node
            for node in top | lazy
            if isinstance(node, ast.Import | ast.ImportFrom)
            and any(within(n, "rmdd.execution.ray") for n in ours(node))
        ]
        assert not nodes or module == "rmdd.execution.backend", module
        assert all(node in lazy for node in nodes), f"{module} imports rmdd.execution.ray at its top"


@pytest.mark.parametrize("module", sorted(RAY))
def test_the_ray_room_holds_no_maths(module):
    assert {room_of(name) for name in IMPORTS[module]} <= {"execution", "core", "config"}
    torch = {name for name in imported(MODULES[module]) if within(name, "torch")}
    assert torch <= {"torch"}, "torch is imported only to set the number of threads"


def test_everything_but_the_ray_room_imports_without_ray():
    names = sorted(name for name in MODULES if name not in RAY and name != "rmdd.__main__")
    code = (
        "import importlib, sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'ray': raise ModuleNotFoundError('ray is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_that_is_read_can_run_code(module):
    for call in ast.walk(MODULES[module]):
        if not isinstance(call, ast.Call):
            continue
        name, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        place = f"{module}:{call.lineno}"
        assert name.split(".")[0] not in ("pickle", "cloudpickle", "dill", "joblib"), place
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), place
        if name == "torch.load":
            assert given.get("weights_only") == "True", place
        assert given.get("allow_pickle", "False") == "False", place
    assert not {"pickle", "cloudpickle", "dill", "joblib"} & set(imported(MODULES[module]))


def test_no_file_is_long():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text().splitlines())) > LINES}
    assert long == {}
