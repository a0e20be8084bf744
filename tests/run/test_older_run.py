"""A run and a merged export of the version before settings moved, in tests/data/older_run: both are
still of use.
"""

import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import write_manifest
from safetensors.torch import load_file
from tiny import tiny_conditioning, tiny_pipeline
from toy_rewards import PROMPTS, redness

from rlhf.adapter.lora_file import is_distilled_adapter, read_lora
from rlhf.config.parse import parse_config
from rlhf.export import main
from rlhf.generator.loading import load_pipeline
from rlhf.io import read_object, write_json
from rlhf.run.metrics import read_metrics
from rlhf.trainer import RewardGradientTrainer

OLDER = Path(__file__).parents[1] / "data" / "older_run"
MOVED = (
    "These settings are of an earlier version. rollout_uses is now rollout_reuse; grad_steps, jump_steps, num_draws, "
    "align_sigmas, align_delta, relative_words, relative_strength: now in method_kwargs, here {'num_draws': 1}; "
    "dry_run, memory_limit_gib, plan_device, plan_processes: now only flags of the train command; second_order_prefix, "
    "optim, guidance_every, sampling_weights, train_blocks, num_train_prompts, drift_weighting, "
    "early_stopping_threshold, lora_use_dora, lora_rank_pattern, lora_alpha_pattern, decode_channels_last: gone, "
    "without effect here."
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


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("finished", [True, False])
def test_its_checkpoint_is_exported_at_the_scale_that_it_was_trained_at(tmp_path, capsys, finished, alpha):
    """The settings state another alpha than RUN/adapter: that is the trained one, if it is there."""
    run = shutil.copytree(OLDER / "run", tmp_path / "run")
    checkpoint = run / "checkpoints" / "step-3"
    state = read_object(checkpoint / "state.json")
    write_json(checkpoint / "state.json", state | {"settings": state["settings"] | {"lora_alpha": alpha}})
    write_manifest(checkpoint)
    if not finished:
        shutil.rmtree(run / "adapter")
    tiny_pipeline().save_pretrained(tmp_path / "base")
    main([str(checkpoint if finished else run), "--adapter", str(tmp_path / "a")])
    assert "step 3 of 3; the scale is that of " in (told := capsys.readouterr().out)
    assert ("adapter/pytorch_lora" in told) == finished
    main([str(checkpoint), "--merged", str(tmp_path / "m"), "--model", str(tmp_path / "base")])

    scale = 1.0 if finished or alpha is None else alpha / 2
    base = tiny_pipeline().transformer
    for name, layer in read_lora(OLDER / "run" / "adapter").layers.items():
        base.get_submodule(name).weight.data += scale * layer.b @ layer.a
    expected, pipe = velocity(base), tiny_pipeline()
    pipe.load_lora_weights(tmp_path / "a")
    torch.testing.assert_close(velocity(pipe.transformer), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(velocity(load_pipeline(tmp_path / "m").transformer), expected, rtol=1e-4, atol=1e-5)
    if scale == 1:
        stored = load_file(OLDER / "velocity.safetensors")["adapter"]
        torch.testing.assert_close(expected, stored, rtol=1e-4, atol=1e-5)


def test_its_checkpoint_says_that_it_is_sampled_without_guidance(tmp_path):
    checkpoint = shutil.copytree(OLDER / "run" / "checkpoints" / "step-3", tmp_path / "step-3")
    assert not is_distilled_adapter(checkpoint)
    state = read_object(checkpoint / "state.json")
    write_json(checkpoint / "state.json", state | {"settings": state["settings"] | {"guidance_gradient": "distill"}})
    assert is_distilled_adapter(checkpoint)
    write_json(checkpoint / "state.json", {"step": 3})
    with pytest.raises(ValueError, match="state.json: got a damaged file"):
        read_lora(checkpoint)


def test_it_goes_on_and_one_paragraph_says_which_settings_moved_where(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(OLDER / "run", tmp_path / "runs" / "run")
    args = parse_config(["--resume_from_checkpoint", str(run / "checkpoints" / "step-3"), "--max_steps", "4"], run)
    assert (args.rollout_reuse, args.lora_rank, args.method_kwargs) == (2, 2, {"num_draws": 1})

    RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS).train()
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["samples"] == 8
    assert rows[3]["reward"] > rows[0]["reward"]
    (told,) = (line for line in capsys.readouterr().out.splitlines() if "earlier version" in line)
    assert told.endswith(f"max_steps 3 -> 4. {MOVED}")
    assert not caplog.records, "once is enough"
