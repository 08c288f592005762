"""SpeechBrain's private names are there, with the signatures that we call."""

import inspect

import pytest
import speechbrain
from speechbrain.utils.checkpoints import Checkpointer

SIGNATURES = [
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
