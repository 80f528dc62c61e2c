import fnmatch
import itertools
import re
from pathlib import Path

import pytest
import yaml

from rmdd import config
from rmdd.config.recipes import BUILT_IN

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    block.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if block.startswith("python3 -m venv")
]


def test_quick_start_is_two_lines_and_ci_runs_the_second():
    first, second = COMMANDS
    assert "\n" not in first + second and first.endswith("rmdd demo")
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith(second)


def spelt_out(pattern: str) -> list[str]:
    """`a_{b,c}` as a_b and a_c, an asterisk and METHOD as what the presets have there."""
    parts = [part[1:-1].split(",") if part[0] == "{" else [part] for part in re.findall(r"\{[^}]*\}|[^{]+", pattern)]
    names = ["".join(chosen) for chosen in itertools.product(*parts)]
    names = [name.replace("METHOD", method) for name in names for method in (BUILT_IN if "METHOD" in name else [""])]
    return [found for n in names for found in (fnmatch.filter(config.preset_names(), n) if "*" in n else [n])]


def test_the_methods_and_presets_are_all_there():
    section = README.partition("\n## Methods\n")[2].partition("\n## ")[0]
    words = re.findall(r"`([a-zA-Z0-9_{},*]+)`", section)
    shown = {name for word in words if re.search("_(100|500|[*]|[{])", word) for name in spelt_out(word)}
    assert shown == set(config.preset_names()) - {"demo"}
    assert set(BUILT_IN) <= set(words)


@pytest.mark.parametrize("block", [b for b in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "method" not in b])
def test_run_files_load(block):
    assert config.load(yaml.safe_load(block)).data.root
