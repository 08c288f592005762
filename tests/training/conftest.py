"""Brains that are ready for their first batch, and a session."""

import functools
import logging
import os
import types

import pytest
import torch
from tiny_brains import begin, make_brain

from lgl_plugin.evaluation.observer import TrueLabels
from lgl_plugin.runs.run import Run
from lgl_plugin.training.session import Session


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


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session without the checks that a yaml and a corpus go through."""
    # SpeechBrain's loggers hand nothing on to pytest's.
    for place in ("session", "start"):
        name = f"lgl_plugin.training.{place}.logger"
        monkeypatch.setattr(name, logging.getLogger("t"))
    session = Session.__new__(Session)
    session.run = Run(tmp_path, 2, {})
    session.settings = types.SimpleNamespace(stage=2, seed=3)
    session.settings.new_encoder = session.settings.new_first_encoder = None
    session.settings.freeze_batch_statistics = False
    session.settings.trained_weights = None
    session.settings.steps_per_epoch = None
    session.settings.grad_accumulation_factor = None
    session.observer, session.debug = TrueLabels([]), False
    session.batch_size, session.device = 8, "cpu"
    return session
