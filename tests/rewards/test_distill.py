"""`python -m rewards.distill` from end to end, small; and what it refuses."""

import json

import pytest
import torch
from runs import adapter
from tiny_wan import save_tiny_wan
from toy_rewards import PROMPTS

from rewards import RewardError
from rewards.distill import Videos, batches_of, main, parse_distill_args
from rewards.models.latent_reward import read_facts
from rlhf.generator.files import transformer_digest
from rlhf.trainer import RewardGradientTrainer

TINY = ["--height=16", "--width=16", "--num_frames=5", "--num_inference_steps=3", "--cpu_threads=1"]
TINY += ["--guidance_scale=1", "--guidance_together=false", "--num_eval_prompts=12", "--per_device_eval_batch_size=16"]


def distil_darkness(tmp_path, *flags):
    """A reward without gradient, which can be read off finished latents."""
    source = "def dark(video, prompts, **info):\n    return (1 - video).mean((1, 2, 3, 4)).detach()\n"
    (tmp_path / "dark.py").write_text(source)
    head = tmp_path / "heads" / "dark.safetensors"
    more = ["--reward_funcs", f"{tmp_path}/dark.py:dark", "--levels=2", "--blocks=1"]
    assert main(["--head", str(head), *more, *TINY, *flags]) == 0
    return head


def test_the_command_writes_a_head_with_its_figures(tmp_path, capsys):
    head = distil_darkness(
        tmp_path, "--videos=10", "--epochs=2", "--num_eval_prompts=3", "--per_device_eval_batch_size=7"
    )
    told, facts = json.loads(head.with_suffix(".json").read_text()), read_facts(head)
    assert told == vars(facts)
    assert (facts.model, facts.blocks, facts.digest) == ("nano", 1, transformer_digest("nano"))
    assert facts.reward["reward_funcs"] == [f"{tmp_path}/dark.py:dark"]
    rows = facts.figures["levels"]
    assert facts.figures["videos"] == 10, "though a batch has eight"
    assert [row["n"] for row in rows] == [6] * 3
    assert [row["sigma"] for row in rows] == pytest.approx([6 / 7, 0.6, 0])  # shift 3; no method scores pure noise
    assert facts.std > 0
    told = capsys.readouterr()
    assert "rank correlation" in told.out
    assert "10/10" in told.err
    assert not head.with_suffix("").exists(), "there is no run"
    assert main(["--head", str(head), *TINY]) == 1
    assert "expected a new file" in capsys.readouterr().err


def test_a_head_of_wan_trains_wan_and_is_refused_by_another(tmp_path, make_args):
    wan = save_tiny_wan(tmp_path / "wan")
    head = distil_darkness(tmp_path, f"--model={wan}", "--videos=8", "--epochs=2", "--num_eval_prompts=3")
    facts = read_facts(head)
    assert (facts.model, facts.blocks, facts.digest) == (str(wan), 1, transformer_digest(wan))
    reward = {"reward_funcs": ["latent_reward"], "reward_kwargs": {"latent_reward": {"path": str(head)}}}
    for method in ("draft_k", "prfl"):
        args = make_args(model=str(wan), output_dir=str(tmp_path / method), method=method, **reward)
        RewardGradientTrainer(None, None, args, PROMPTS).train()
        assert adapter(args).abs().sum() > 0
    with pytest.raises(RewardError, match="a run on nano, whose transformer is not the one"):
        RewardGradientTrainer(None, None, make_args(output_dir=str(tmp_path / "other"), **reward), PROMPTS)


@pytest.mark.slow
def test_a_head_ranks_unseen_videos_better_the_less_noise_there_is(tmp_path):
    head = distil_darkness(tmp_path, "--videos=192", "--epochs=20")
    found = [row["spearman"] for row in read_facts(head).figures["levels"]]
    assert found[-1] > 0.5  # of 24 videos: chance reaches it once in 150
    assert found[-1] > found[0]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--blocks", "9"], "blocks: got 9, expected 1 to 6"),
        (["--videos", "1"], "--videos: got 1, expected at least 2"),
        (["--eval_prompts", "none"], "eval_prompts: got none, expected held-out prompts"),
        (["--initial_adapter", "some"], "initial_adapter: got some, expected a base without one"),
        (["--reward_funcs", "latent_reward"], "got no `path`"),
        (["--calibrate_rewards", "8"], "calibrate_rewards: got 8, expected 0, since a head predicts"),
        (["--learning_rat", "1"], "learning_rate"),
    ],
)
def test_what_cannot_work_is_told_before_weights_are_loaded(tmp_path, monkeypatch, capsys, flags, part):
    monkeypatch.setattr("rlhf.training.setup.find_base", lambda *_: pytest.fail("loaded"))
    assert main(["--head", str(tmp_path / "x.safetensors"), *flags]) == 1
    assert part in capsys.readouterr().err


def test_the_file_beside_a_head_is_not_written_over(tmp_path, capsys):
    (tmp_path / "x.json").write_text("mine")
    assert main(["--head", str(tmp_path / "x.safetensors")]) == 1
    assert "expected a new file .safetensors, and none beside it .json" in capsys.readouterr().err


def test_several_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["--head", str(tmp_path / "x.safetensors")]) == 1
    assert "processes: got 2, expected one" in capsys.readouterr().err


def test_batches_are_of_one_level_and_hold_each_state_once():
    states = {level: [(row, torch.tensor([level, row])) for row in range(5 + level)] for level in (1, 3)}
    found = list(batches_of(Videos([], torch.zeros(9), states), 4, seed=0))
    assert all(x[0] == level for level, part in found for _, x in part)
    assert sorted((level, row) for level, part in found for row, _ in part) == sorted(
        (level, row) for level in states for row in range(5 + level)
    )
    assert max(len(part) for _, part in found) == 4


def test_the_number_of_blocks_is_that_of_the_paper_but_at_most_half(tmp_path):
    assert parse_distill_args(["--head", str(tmp_path / "x.safetensors")])[0].blocks == 3
