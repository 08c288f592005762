"""The mean of a step's last checkpoints."""

import pytest
import torch
from tiny_brains import batch, begin, make_brain, run_epoch

from lgl_plugin.inference.checkpoint_average import average_step
from lgl_plugin.runs.checkpoints import WholeCheckpointer


def test_the_mean_of_the_last_epochs_that_were_kept(tmp_path):
    """Of encoder and classifier, which a brain keeps as it is told to."""
    folder = tmp_path / "iter1" / "gated"
    checkpointer = WholeCheckpointer(folder / "checkpoints")
    brain = make_brain(
        "gated", folder, checkpointer=checkpointer, keep_checkpoints=2
    )
    parts = {
        "embedding_model": brain.modules.encoder.network,
        "classifier": brain.modules.classifier,
    }
    checkpointer.add_recoverables(parts)
    begin(brain)
    passed = []
    for epoch in (1, 2, 3):
        run_epoch(brain, epoch, batch(2))
        passed.append(
            {
                name: {k: v.clone() for k, v in part.state_dict().items()}
                for name, part in parts.items()
            }
        )
    assert len(checkpointer.list_checkpoints()) == 2
    name = average_step(tmp_path, "iter1/gated", 2)
    assert name == "iter1/gated/average2"
    for part in parts:
        found = torch.load(tmp_path / name / f"{part}.ckpt", weights_only=True)
        for key, value in found.items():
            expected = (passed[1][part][key] + passed[2][part][key]) / 2
            torch.testing.assert_close(value, expected)
    # Frozen weights, which checkpoints leave out, are in the step's own file.
    left_out = {**passed[2]["embedding_model"], "front.weight": torch.ones(2)}
    torch.save(left_out, folder / "embedding_model.ckpt")
    average_step(tmp_path, "iter1/gated", 2)
    path = tmp_path / name / "embedding_model.ckpt"
    again = torch.load(path, weights_only=True)
    assert torch.equal(again.pop("front.weight"), torch.ones(2))
    for key, value in again.items():
        one, other = (p["embedding_model"][key] for p in passed[1:])
        torch.testing.assert_close(value, (one + other) / 2)
    # The same run would do nothing: the step is done.
    said = "take --average=2. .* another --output_folder with --keep_check.*=3"
    with pytest.raises(ValueError, match=f"of 2 epochs.*{said}"):
        average_step(tmp_path, "iter1/gated", 3)
    with pytest.raises(ValueError, match="of 0 epochs.*leave it out"):
        average_step(tmp_path, "iter1/labels", 2)
