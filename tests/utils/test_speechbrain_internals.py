"""SpeechBrain's private names are there, with the signatures that we call."""

import inspect

import pytest
import speechbrain
from speechbrain.core import Brain
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.utils.checkpoints import Checkpointer

SIGNATURES = [
    (Brain, "_save_intra_epoch_ckpt", "(self)"),
    (Brain, "_wrap_distributed", "(self)"),
    (Checkpointer, "_list_checkpoint_dirs", "(self)"),
    (Checkpointer, "_construct_checkpoint_objects", "(checkpoint_dirs)"),
]


@pytest.mark.parametrize("owner, name, expected", SIGNATURES)
def test_a_private_name_is_as_it_was(owner, name, expected):
    where = f"SpeechBrain {speechbrain.__version__}: {owner.__name__}.{name}"
    found = getattr(owner, name, None)
    assert found is not None, f"{where} is gone"
    signature = str(inspect.signature(found))
    assert signature == expected, f"{where} takes {signature}, not {expected}"


def test_a_loader_skips_the_batches_that_it_is_told_to():
    where = f"SpeechBrain {speechbrain.__version__}: SaveableDataLoader"
    loader = SaveableDataLoader(range(5), batch_size=1)
    loader._speechbrain_recovery_skip_to = 3
    seen = [batch.item() for batch in loader]
    assert seen == [3, 4], f"{where}._speechbrain_recovery_skip_to does nothing"
