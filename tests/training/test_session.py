"""What both stages do alike."""

import pathlib
import sys
import types

from speechbrain.utils.train_logger import TensorboardLogger

from lgl_plugin.training.session import Training


def test_tensorboard_has_a_curve_for_each_figure(monkeypatch, tmp_path):
    """SpeechBrain's own logger; its writer, which is large, has a stand-in."""
    curves = {}

    class Writer:
        """Remembers the points of each curve."""

        def __init__(self, folder):
            assert folder == tmp_path

        def add_scalar(self, tag, value, step):
            curves.setdefault(tag, []).append((step, value))

    stand_in = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    settings = {"train_logger": TensorboardLogger(tmp_path)}
    training = types.SimpleNamespace(hparams=settings)
    phase = pathlib.PurePosixPath("iter1/gated")
    for epoch, tau in ((1, None), (2, 0.5)):
        record = {"epoch": epoch, "loss": 3.0 / epoch, "tau": tau}
        Training.show(training, phase, record)
    assert curves == {
        "epoch": [(1, 1), (2, 2)],
        "iter1/gated/loss/train": [(1, 3.0), (2, 1.5)],
        "iter1/gated/tau/train": [(1, 0.5)],  # none before the gate
    }
