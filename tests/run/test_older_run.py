"""A run and a merged export of the version before settings moved, in tests/data/older_run: both are
still of use.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_conditioning, tiny_pipeline
from toy_rewards import PROMPTS, redness

from rlhf.config.parse import parse_config
from rlhf.generator.loading import load_pipeline
from rlhf.run.metrics import read_metrics
from rlhf.trainer import RewardGradientTrainer

OLDER = Path(__file__).parents[1] / "data" / "older_run"
MOVED = (
    "These settings are of an earlier version. rollout_uses is now rollout_reuse; grad_steps, jump_steps, num_draws, "
    "align_sigmas, align_delta, relative_words, relative_strength: now in method_kwargs, here {'num_draws': 1}; "
    "dry_run, memory_limit_gib, plan_device, plan_processes: now only flags of the train command; second_order_prefix, "
    "optim, train_blocks, early_stopping_threshold, decode_channels_last: gone, without effect here."
)


@torch.no_grad()
def velocity(transformer) -> torch.Tensor:
    x, cond = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(2)), tiny_conditioning()
    inputs = cond.prompt_embeds_BLD, cond.pooled_embeds_BP, torch.tensor([500.0])
    return transformer(x, *inputs, return_dict=False)[0]


@pytest.fixture
def merged(tmp_path):
    """The whole folder of the export: what training left as it was comes from the tiny pipeline."""
    tiny_pipeline().save_pretrained(tmp_path / "merged")
    return shutil.copytree(OLDER / "merged", tmp_path / "merged", dirs_exist_ok=True)


def test_its_adapter_and_its_merged_export_give_the_velocities_that_they_gave(merged):
    expected, pipe = load_file(OLDER / "velocity.safetensors"), tiny_pipeline()
    base = velocity(pipe.transformer)
    pipe.load_lora_weights(OLDER / "run" / "adapter")
    assert (base - expected["adapter"]).abs().max() > 5e-3
    torch.testing.assert_close(velocity(pipe.transformer), expected["adapter"], rtol=1e-4, atol=1e-5)
    loaded = load_pipeline(merged, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(velocity(loaded.transformer), expected["merged"], rtol=1e-4, atol=1e-5)


def test_it_goes_on_and_one_paragraph_says_which_settings_moved_where(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(OLDER / "run", tmp_path / "runs" / "run")
    args = parse_config(["--resume_from_checkpoint", str(run / "checkpoints" / "step-3"), "--max_steps", "4"], run)
    assert (args.rollout_reuse, args.guidance_every, args.method_kwargs) == (2, 2, {"num_draws": 1})

    RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS).train()
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["samples"] == 8
    assert rows[3]["reward"] > rows[0]["reward"]
    (told,) = (line for line in capsys.readouterr().out.splitlines() if "earlier version" in line)
    assert told.endswith(f"max_steps 3 -> 4. {MOVED}")
    assert not caplog.records, "once is enough"
