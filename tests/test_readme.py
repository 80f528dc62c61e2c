import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = [
    block.strip()
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if block.startswith("python3 -m venv")
]


def test_quick_start_is_two_lines_and_ci_runs_the_second():
    first, second = COMMANDS
    assert "\n" not in first + second and first.endswith("rmdd demo")
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith(second)
