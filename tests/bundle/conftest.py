"""One bundle of a small network, which tests copy."""

import shutil

import pytest
from small_bundle import make_run

from qdq.bundle import make_bundle


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def made(run_folder, tmp_path_factory):
    """The report of a bundle with the float network, which no test changes."""
    folder = tmp_path_factory.mktemp("made") / "bundle"
    return make_bundle(run_folder, folder, count=2, with_float=True, archive=True)


@pytest.fixture
def bundle(made, tmp_path):
    """A copy of it in a folder with spaces and other marks in its name."""
    return shutil.copytree(made.folder, tmp_path / "a copy, it's: $HOME")
