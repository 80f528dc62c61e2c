"""Generated pages of the manual: one per built-in method, and one for the Python API.

`python -m rmdd.cli.reference` writes them from docstrings, defaults and presets. A test compares them with the files.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from rmdd.cli.docs import FOLDER
from rmdd.config import as_yaml
from rmdd.config.recipes import BUILT_IN

NOTE = "<!-- `python -m rmdd.cli.reference` writes this page; change {source} instead. -->"


def generated() -> dict[str, str]:
    """Return the text of every generated page by its path below the folder of the manual."""
    return {f"methods/{name}.md": method_page(name) for name in sorted(BUILT_IN)} | {"api.md": api_page()}


def write() -> list[str]:
    """Write the generated pages whose text changed, and remove the pages of methods that no longer exist."""
    texts = generated()
    old = {path.relative_to(FOLDER).as_posix(): path for path in FOLDER.glob("methods/*.md")}
    for name in old.keys() - texts:
        old[name].unlink()
    changed = [name for name, text in texts.items() if not (FOLDER / name).is_file() or _read(name) != text]
    for name in changed:
        (FOLDER / name).parent.mkdir(exist_ok=True)
        (FOLDER / name).write_text(texts[name], encoding="utf-8")
    return changed


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def method_page(name: str) -> str:
    """Return the Markdown page of a distillation method, with the text that `rmdd methods NAME` prints."""
    from rmdd.methods.about import about

    facts = about(name)
    module = facts["place"].partition(":")[0].replace(".", "/")
    first, _, rest = facts["text"].partition("\n\n")
    lines = [f"# {' '.join(first.split()).rstrip('.')}", "", NOTE.format(source=f"the docstring in {module}.py"), ""]
    lines += ["| | |", "|---|---|", f"| in a run file | `distill.method: {name}` |", f"| family | {facts['family']} |"]
    lines += [f"| needs | {', '.join(facts['needs']) or 'nothing'} |"]
    lines += [f"| published | {_linked(facts['card'])} |"] if facts["card"] else []
    lines += [f"| verified | {facts['status']} |"] if facts["status"] else []
    lines += ["", rest.rstrip(), "", "## Values", ""]
    if facts["defaults"]:
        values = {**facts["defaults"], "distill": {"method": name, **facts["defaults"].get("distill", {})}}
        lines += ["The method sets these values unless the run file sets them.", ""]
        lines += ["```yaml", as_yaml(values).rstrip(), "```", ""]
    else:
        lines += ["The method changes no default of the run file.", ""]
    lines += ["## Options", ""]
    options = [f"- `{key}`: {meaning}" for key, meaning in facts["options"].items()]
    lines += ["Options stand in the section `distill.options` of the run file.", "", *options, ""] if options else []
    lines += [] if options else ["The method has no options.", ""]
    presets = ", ".join(f"`{preset}`" for preset in facts["presets"])
    lines += ["## Presets", "", f"{presets or 'None'}."]
    return "\n".join(lines) + "\n"


def _linked(card: str) -> str:
    """Return where a method was published, as Markdown; an arXiv number becomes a link."""
    return re.sub(r"(?:arXiv )?(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", card)


def api_page() -> str:
    """Return the Markdown page of the Python API: all public names of `rmdd` and the classes of their results."""
    public = importlib.import_module("rmdd")
    lines = ["# Python API", "", NOTE.format(source="the docstrings"), ""]
    lines += ["`import rmdd` is instant; torch, transformers and Ray are imported when a function needs them.", ""]
    results: dict[str, type] = {}
    arguments = importlib.import_module("rmdd.coresets.choice").Choice
    for name in public.__all__:
        value = getattr(public, name)
        if isinstance(value, str):
            lines += [f"## `rmdd.{name}`", "", "The version of rmdd, a string.", ""]
        elif isinstance(value, type):
            results[value.__name__] = value
        else:
            function = getattr(value, "__func__", value)
            lines += [f"## `rmdd.{name}`", "", *_function(function, f"rmdd.{name}")]
            results |= {kind.__name__: kind for kind in _classes(_returned(function))}
    for kind in list(results.values()):
        for hint in getattr(kind, "__annotations__", {}).values():
            same = [part for part in _classes(hint) if part.__module__ == kind.__module__]
            results |= {part.__name__: part for part in same}
    results[arguments.__name__] = arguments
    lines += ["## Classes", "", "[Run files](runfiles.md) describes the fields of the sections of `Run`.", ""]
    for kind in results.values():
        lines += [f"### `{kind.__name__}`", "", *_class(kind)]
    return "\n".join(lines).rstrip() + "\n"


def _returned(function: Any) -> Any:
    """Return the type hint of the result of `function`. Hints of arguments may name types imported only for mypy."""
    hint = function.__annotations__["return"]
    return eval(hint, vars(inspect.getmodule(function))) if isinstance(hint, str) else hint


def _classes(hint: Any) -> Iterator[type]:
    """Yield the classes of rmdd that a type hint contains, such as `Subset` in `tuple[Subset, ...]`."""
    if isinstance(hint, type) and hint.__module__.startswith("rmdd."):
        yield hint
    for part in get_args(hint):
        yield from _classes(part)


def _function(function: Any, name: str) -> list[str]:
    """Return the signature and the docstring of a function as Markdown."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef)
    return [*_signature(node, name), *_text(ast.get_docstring(node))]


def _signature(node: ast.FunctionDef, name: str) -> list[str]:
    """Return the signature of a function as a code block; if it is long, each argument is on its own line."""
    parts = _parts(node.args)
    result = f" -> {_annotation(node.returns)}" if node.returns else ""
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) > 100:
        line = "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){result}"])
    return ["```text", line, "```", ""]


def _parts(arguments: ast.arguments) -> list[str]:
    """Return the text of each argument in a signature, without `self` and `cls`."""
    plain = [argument for argument in arguments.args if argument.arg not in ("self", "cls")]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    parts = [_argument(argument, default) for argument, default in zip(plain, defaults, strict=True)]
    if arguments.vararg:
        parts.append(f"*{_argument(arguments.vararg)}")
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_argument(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return parts + ([f"**{_argument(arguments.kwarg)}"] if arguments.kwarg else [])


def _argument(argument: ast.arg, default: ast.expr | None = None) -> str:
    hint = f": {_annotation(argument.annotation)}" if argument.annotation else ""
    return f"{argument.arg}{hint}" + (f" = {ast.unparse(default)}" if default else "")


def _annotation(node: ast.expr) -> str:
    """Return a type hint as written in the code, without quotes."""
    return str(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)


def _class(kind: type) -> list[str]:
    """Return the docstring, the fields and the public methods of a class as Markdown."""
    node = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(node, ast.ClassDef)
    lines = [*_text(ast.get_docstring(node))]
    fields = [f"- `{name}: {hint}`{meaning}" for name, hint, meaning in _fields(node.body)]
    methods: list[str] = []
    for item in node.body:
        if not isinstance(item, ast.FunctionDef) or item.name.startswith("_"):
            continue
        decorators = {ast.unparse(decorator) for decorator in item.decorator_list}
        if decorators & {"property", "functools.cached_property"}:
            meaning = " ".join((ast.get_docstring(item) or "").split())
            hint = f": {_annotation(item.returns)}" if item.returns else ""
            fields.append(f"- `{item.name}{hint}`{': ' * bool(meaning)}{meaning}")
        elif ast.get_docstring(item):
            name = f"{kind.__name__}.{item.name}"
            methods += [f"#### `{name}`", "", *_signature(item, name), *_text(ast.get_docstring(item))]
    return [*lines, *fields, *([""] if fields else []), *methods]


def _fields(body: list[ast.stmt]) -> Iterator[tuple[str, str, str]]:
    """Yield name, type and meaning of every public field of a class; the meaning ends with the default value."""
    for item, after in zip(body, [*body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name) or item.target.id[0] == "_":
            continue
        meaning = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            meaning = str(after.value.value)
        default = item.value
        if isinstance(item.value, ast.Call):
            default = item.value.args[0] if item.value.args else None
            words = {keyword.arg: keyword.value for keyword in item.value.keywords}
            described = words.get("description")
            meaning = str(described.value) if isinstance(described, ast.Constant) else meaning
        if isinstance(default, ast.Constant) and default.value is not ...:
            meaning += f" (default `{ast.unparse(default)}`)"
        yield item.target.id, _annotation(item.annotation), f": {' '.join(meaning.split())}" if meaning else ""


def _text(docstring: str | None) -> list[str]:
    """Return a docstring as Markdown; lines with `>>>` become code blocks."""
    if not docstring:
        return []
    lines: list[str] = []
    for example, group in _runs(docstring.replace("  # doctest: +SKIP", "").splitlines()):
        lines += ["```pycon", *group, "```"] if example else group
    return [*lines, ""]


def _runs(lines: Iterable[str]) -> Iterator[tuple[bool, list[str]]]:
    """Split `lines` into groups of neighbouring lines: code examples (`>>>`) or text."""
    group: list[str] = []
    example = False
    for line in lines:
        if group and line.startswith((">>> ", "... ")) != example:
            yield example, group
            group = []
        example = line.startswith((">>> ", "... "))
        group.append(line)
    if group:
        yield example, group


if __name__ == "__main__":
    names = write()
    print("\n".join(f"wrote {name}" for name in names) or "every page is up to date")
