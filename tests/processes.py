"""Start `rmdd` processes quickly, by forking a process that has already imported the package."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONTEXT = get_context("forkserver")
USED = """rmdd.cli.app rmdd.pipeline rmdd.searches rmdd.searches.sweeps rmdd.comparisons.compare rmdd.methods.ptm_st
rmdd.evaluate.health_of_run rmdd.report.page rmdd.report.health torch._dynamo"""
CONTEXT.set_forkserver_preload(USED.split())


class Forked:
    """A process that calls `function(*arguments)`, with the methods of `subprocess.Popen` to watch and to kill it.

    The function must be importable by its module and name.
    """

    def __init__(self, function: Callable[..., object], *arguments: object, **environment: str):
        with contextlib.chdir(ROOT), pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            forkserver.ensure_running()
            self.folder = tempfile.TemporaryDirectory()
            self.files = [Path(self.folder.name, name) for name in ("stdout", "stderr")]
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        asked = (function, arguments, variables, os.getcwd(), [str(file) for file in self.files])
        self.process = CONTEXT.Process(target=_forked, args=asked)
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        """Kill the process (SIGKILL) and wait until it has ended."""
        self.process.kill()
        self.process.join()

    def terminate(self) -> None:
        """Send SIGTERM to the process."""
        self.process.terminate()

    def communicate(self, timeout: float = 400) -> tuple[str, str]:
        """Wait until the process has ended and return what it printed."""
        self.process.join(timeout)
        assert self.returncode is not None, f"the process has not ended after {timeout} seconds"
        written = [file.read_text() if file.exists() else "" for file in self.files]
        return written[0], written[1]


class Rmdd(Forked):
    """A process that runs the command `rmdd WORDS`."""

    def __init__(self, *words: object, **environment: str):
        super().__init__(_rmdd, *(str(word) for word in words), **environment)


def done(*words: object, **environment: str) -> str:
    """Run `rmdd WORDS` and return what it prints."""
    process = Rmdd(*words, **environment)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    return output


def _forked(
    function: Callable[..., object],
    arguments: tuple[object, ...],
    environment: dict[str, str],
    folder: str,
    files: list[str],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    function(*arguments)


def _rmdd(*words: str) -> None:
    sys.argv = [str(ROOT / "rmdd" / "__main__.py"), *words]
    from rmdd.cli.app import main

    main()
