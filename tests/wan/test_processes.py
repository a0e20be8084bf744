"""Two processes train Wan as one does: data, guidance branches and tokens divided."""

import many_runs
import pytest
import torch
from processes import together

RECOMPUTING = {"gradient_checkpointing": True, "keep_attention": True, "stepwise_backward": True}
MODULES = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.2", "time_proj"]  # that read video, text and timestep
WAN = {"wan": torch.float32, "max_steps": 3, "lora_target_modules": MODULES}
OF_TWO = {
    "data": WAN | {"per_device_train_batch_size": 2},
    "guidance": WAN | {"per_device_train_batch_size": 4, "guidance_parallel": 2},
    "sequence": WAN | {"per_device_train_batch_size": 4, "sequence_parallel": 2},
    "sequence, recomputed": WAN | {"per_device_train_batch_size": 4, "sequence_parallel": 2, **RECOMPUTING},
}
MIXED = {"wan": torch.bfloat16, "max_steps": 3, "per_device_train_batch_size": 2, "gradient_checkpointing": True}
FORMATS = {"whole": MIXED, "sharded": MIXED | {"shard_base": True}}


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    alone = many_runs.run(tmp_path / "alone", WAN | {"per_device_train_batch_size": 4})
    together(many_runs.runs, tmp_path, OF_TWO | FORMATS, processes=2)
    for name in OF_TWO:
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False)
            assert len(found["gradients"]) == len(alone["gradients"]) == 3
            for gradient, expected in zip(found["gradients"], alone["gradients"], strict=True):
                difference = (gradient - expected).abs().max() / expected.abs().max()
                assert difference < 1e-4, (name, rank)
            torch.testing.assert_close(
                found["weights"], alone["weights"], rtol=0, atol=1e-5
            )  # of 0.03; AdamW enlarges rounding

    whole, sharded = (torch.load(tmp_path / f"{name}-0.pt", weights_only=False) for name in FORMATS)
    assert torch.equal(sharded["weights"], whole["weights"]), "two number formats are sharded together"
    assert 0.4 * sharded["whole"] < sharded["held"] < 0.6 * sharded["whole"]
