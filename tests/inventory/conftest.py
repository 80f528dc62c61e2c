"""Fixtures for tests of inventories: a storage with every kind of work, which is made once."""

import shutil

import pytest
import works


@pytest.fixture(scope="package")
def made(tmp_path_factory):
    """Fixture: a storage that `works.make` filled. Tests must not change it; they change the copy `storage`."""
    storage = tmp_path_factory.mktemp("inventory") / "runs"
    works.make(storage)
    return storage


@pytest.fixture
def storage(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs", symlinks=True)
