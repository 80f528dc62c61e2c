"""Fixtures for tests of inventories: a storage with every kind of work, which is made once."""

import shutil

import pytest
import works


@pytest.fixture(scope="package")
def made(tmp_path_factory):
    """Fixture: the folder of the storage that `works.make` fills; tests change copies of it (fixture `storage`)."""
    storage = tmp_path_factory.mktemp("inventory") / "runs"
    works.make(storage)
    return storage


@pytest.fixture
def storage(made, tmp_path):
    return shutil.copytree(made, tmp_path / "runs", symlinks=True)
