"""What several GPUs need and two processes on a CPU cannot show."""

import torch
from devices import ON_GPU

from lgl_plugin.utils import distributed


@ON_GPU
def test_nccl_sums_what_lies_on_the_host_too(tmp_path, monkeypatch):
    """Counts and what processes were told are there, losses on the GPU."""
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        loss = torch.tensor(0.5, device="cuda")
        found = distributed.sum_over_ranks(
            {"loss": loss, "utterances": 8, "told": torch.tensor(True)}
        )
    finally:
        torch.distributed.destroy_process_group()
    expected = {"loss": 0.5, "told": 1.0, "utterances": 8.0}
    assert {name: float(value) for name, value in found.items()} == expected
