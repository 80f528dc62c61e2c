import subprocess
import sys

import pytest

import rmdd


def test_import_is_light():
    code = (
        "import sys; before = set(sys.modules); import rmdd; rmdd.__version__\n"
        "print({name.split('.')[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'rmdd'}"


def test_public_names():
    from rmdd.artefact.distilled import load
    from rmdd.config import Run
    from rmdd.config import load as load_config

    assert rmdd.load is load and rmdd.Run is Run and rmdd.load_config is load_config
    assert set(rmdd.__all__) <= set(dir(rmdd)) and isinstance(rmdd.__version__, str)
    with pytest.raises(AttributeError, match="no attribute 'laod'; available: Run"):
        _ = rmdd.laod
