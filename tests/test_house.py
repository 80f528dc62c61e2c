"""The rules that hold the house together, read off the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rmdd"
SOURCES = {p.relative_to(ROOT).with_suffix(""): ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}
MODULES = {".".join(path.parts).removesuffix(".__init__"): tree for path, tree in SOURCES.items()}
RUNTIME = {name for name in MODULES if name == "rmdd.execution.ray" or name.startswith("rmdd.execution.ray.")}
RUNTIME_MAY_IMPORT = {"rmdd.config", "rmdd.core.files", "rmdd.core.threads"} | {
    f"rmdd.execution.{name}" for name in ("executor", "parts", "signals", "tasks", "trials")
}
LINES = 450


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of what is imported anywhere in `tree`, inside functions too; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def lazy_part(tree: ast.Module) -> set[ast.AST]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node for outer in ast.walk(tree) if isinstance(outer, functions) for node in ast.walk(outer)}


def test_the_scan_sees_the_package():
    assert {"rmdd", "rmdd.pipeline", "rmdd.execution.ray.actors", "rmdd.distill.unroll"} <= MODULES.keys()
    assert any(within(name, "ray") for name in imported(MODULES["rmdd.execution.ray.stream"]))


@pytest.mark.parametrize("module", sorted(MODULES.keys() - RUNTIME))
def test_only_runtime_imports_ray(module):
    assert [name for name in imported(MODULES[module]) if within(name, "ray")] == []


def test_only_the_backend_calls_runtime_and_only_inside_functions():
    for module in MODULES.keys() - RUNTIME:
        tree = MODULES[module]
        lazy = lazy_part(tree)
        nodes = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            and any(within(n, "rmdd.execution.ray") for n in imported(node))
        ]
        assert not nodes or module == "rmdd.execution.backend", module
        assert all(node in lazy for node in nodes), f"{module} imports rmdd.execution.ray at its top"


@pytest.mark.parametrize("module", sorted(RUNTIME))
def test_runtime_holds_no_maths(module):
    ours = {name for name in imported(MODULES[module]) if name in MODULES and name != "rmdd"}
    assert ours - RUNTIME <= RUNTIME_MAY_IMPORT
    torch = {name for name in imported(MODULES[module]) if within(name, "torch")}
    assert torch <= {"torch"}, "threads are set through torch; tensors belong elsewhere"


def test_everything_but_runtime_imports_without_ray():
    names = sorted(name for name in MODULES if name not in RUNTIME and name != "rmdd.__main__")
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
