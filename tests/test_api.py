import subprocess
import sys

import pytest

import rmdd

HEAVY = ("torch", "ray", "transformers", "timm", "pyarrow", "pydantic", "numpy")


def test_import_is_light():
    code = f"import sys, rmdd; rmdd.__version__; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    from rmdd.artefact.distilled import load
    from rmdd.config import Run
    from rmdd.config import load as load_config

    assert rmdd.load is load and rmdd.Run is Run and rmdd.load_config is load_config
    assert set(rmdd.__all__) <= set(dir(rmdd)) and isinstance(rmdd.__version__, str)
    with pytest.raises(AttributeError, match="no attribute 'laod'; available: Run"):
        _ = rmdd.laod
