"""Brains that are ready for their first batch."""

import functools
import os

import pytest
import torch
from tiny_brains import begin, make_brain


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """No test pulls the plug."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def make(tmp_path):
    """Makes a Brain by its kind, with other modules if they are given."""

    def make(
        kind,
        run_opts=(),
        fused=True,
        selection="last",
        encoder=None,
        **modules,
    ):
        options = {"run_opts": run_opts, "fused": fused, "selection": selection}
        options["encoder"] = encoder
        return begin(make_brain(kind, tmp_path, modules, **options))

    return make


@pytest.fixture
def simclr(make):
    return make("simclr")


@pytest.fixture
def gated(make):
    return functools.partial(make, "gated")
