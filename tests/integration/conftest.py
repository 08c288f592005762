"""A tiny corpus and a tiny run of the real recipe, shared by the tests."""

import pytest
from kill import tiny_corpus  # of tests/
from tiny import STAGE1, STAGE2, train_here


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Five speakers to train on, two to test on."""
    folder = tmp_path_factory.mktemp("corpus")
    tiny_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def stage1_run(corpus, tmp_path_factory):
    """A finished Stage I."""
    output = tmp_path_factory.mktemp("run")
    train_here("small_stage1.yaml", corpus, output, *STAGE1)
    return output


@pytest.fixture(scope="session")
def run(corpus, stage1_run):
    """A finished run of both stages."""
    train_here("small_stage2.yaml", corpus, stage1_run, *STAGE2)
    return stage1_run
