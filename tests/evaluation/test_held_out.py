"""Held-out evaluation: equal noise whatever the batch, judges without gradient."""

import pytest
import torch
from runs import OneProcess

from rlhf.config import RewardGradientConfig
from rlhf.evaluation.held_out import EVAL_FINGERPRINT, EvalOptions, Evaluation, HeldOut, fingerprint
from rlhf.evaluation.measures import MEASURES
from rlhf.method.decode import Sampled
from rlhf.types import Prompt, row_of

SHAPE = (16, 2, 2, 2)
PROMPTS = [f"prompt {i}" for i in range(5)]


def make_videos(prompts, noise):
    """The noise as a video: three channels, five frames."""
    return Sampled((noise[:, :3] + 0.5).clamp(0, 1).repeat(1, 1, 3, 8, 8)[:, :, :5])


def first_pixel(video, prompts, **info):
    assert not torch.is_grad_enabled()
    return video[:, 0, 0, 0, 0] * 100 + torch.tensor([float(p[-1]) for p in prompts])


@pytest.fixture
def held_out(tmp_path):
    def make(**changes):
        settings = {"eval_seed": 3, "per_device_eval_batch_size": 2}
        settings |= {"num_sample_prompts": 3, "num_diversity_prompts": 3} | changes
        options = EvalOptions.from_settings(RewardGradientConfig(**settings))
        return HeldOut(make_videos, {"pixel": first_pixel}, PROMPTS, SHAPE, 8, options, tmp_path, OneProcess())

    return make


def test_scores_do_not_depend_on_the_batch_and_videos_are_the_leading_ones(held_out):
    in_twos, in_fives = (held_out(per_device_eval_batch_size=n).evaluate("x", 0) for n in (2, 5))
    for name in ("pixel", *MEASURES):
        assert torch.equal(in_twos.scores[name], in_fives.scores[name])
        assert in_twos.scores[name].unique().numel() > 1
    assert len(in_twos.scores["pixel"]) == 5
    assert len(in_twos.scores["diversity"]) == 3
    assert len(held_out(num_diversity_prompts=9).evaluate("x", 0).scores["diversity"]) == 5, "there are no more"
    assert in_twos.videos_NCTHW.shape == (3, 3, 5, 16, 16)
    assert torch.equal(in_twos.videos_NCTHW, in_fives.videos_NCTHW)


def test_another_seed_gives_other_noise(held_out):
    a, b = (held_out(eval_seed=seed).evaluate("x", 0).scores["pixel"] for seed in (0, 1))
    assert not torch.allclose(a, b)


def test_base_is_made_once_and_read_again_only_by_a_resumed_run(held_out, monkeypatch):
    still = held_out().base(resumed=False, make_videos=lambda prompts, noise: make_videos(prompts, 0 * noise))
    assert still.scores["motion"].tolist() == [0.0] * 5, "of the model that is handed over"
    first = held_out().base(resumed=False)
    assert first.scores["motion"].min() > 0
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    again = held_out().base(resumed=True)
    assert again.prompts == first.prompts
    assert all(torch.equal(again.scores[name], first.scores[name]) for name in first.scores)
    assert torch.equal(again.videos_NCTHW, first.videos_NCTHW)
    with pytest.raises(pytest.fail.Exception):
        held_out().base(resumed=False)


def test_every_setting_that_makes_another_video_or_score_makes_the_base_anew(held_out, monkeypatch):
    held_out(num_sample_prompts=0).base(resumed=False)
    anew = Evaluation([], {}, torch.zeros(0))
    monkeypatch.setattr(HeldOut, "evaluate", lambda *_, **__: anew)
    monkeypatch.setattr(Evaluation, "save", lambda *_: None)  # the base that is there stays
    assert held_out(num_sample_prompts=0).base(resumed=True) is not anew
    changes = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 2.5}
    changes |= {"negative_prompt": "dark", "max_sequence_length": 9, "reward_kwargs": {"pixel": {"a": 1}}}
    changes |= {"dtype": "bfloat16", "base_bits": 4, "vae_dtype": "bfloat16"}
    changes |= {"eval_seed": 4, "num_diversity_prompts": 2}
    for name, value in changes.items():
        assert held_out(num_sample_prompts=0, **{name: value}).base(resumed=True) is anew, name
    for changed in (
        {"prompts": PROMPTS[:4]},
        {"prompts": [Prompt(prompt, {"target": "red"}) for prompt in PROMPTS]},
        {"judges": {"pixel": first_pixel, "other": first_pixel}},
    ):
        other = held_out(num_sample_prompts=0)
        vars(other).update(changed)
        assert other.base(resumed=True) is anew, changed


def test_rows_reach_every_judge_and_come_back_from_the_file(held_out, tmp_path):
    def target(video, prompts, rows):
        return torch.tensor([row["target"] for row in rows])

    judged = held_out(num_sample_prompts=0)
    judged.prompts = [Prompt(prompt, {"target": i / 2}) for i, prompt in enumerate(PROMPTS)]
    judged.judges = {"target": target}
    assert judged.base(resumed=False).scores["target"].tolist() == [0, 0.5, 1, 1.5, 2]
    kept = judged.base(resumed=True)
    assert [row_of(prompt) for prompt in kept.prompts] == [row_of(prompt) for prompt in judged.prompts]


def test_two_processes_share_the_prompts(held_out):
    class Second(OneProcess):
        num_processes, process_index, is_main_process = 2, 1, False

        def gather(self, tensor):
            return torch.cat([tensor, tensor])

    both = held_out()
    second = held_out(num_sample_prompts=5, num_frames=5, height=16, width=16)
    second.layout = Second()
    scores, whole = second.evaluate("x", 0).scores["pixel"], both.evaluate("x", 0).scores["pixel"]
    assert scores[:3].tolist() == [0, 0, 0]  # summed with the first process's
    assert torch.equal(scores[3:], whole[3:])
    assert len(second.evaluate("x", 0).videos_NCTHW) == 0


def test_the_base_is_measured_anew_by_all_processes_if_one_sees_another_model(held_out):
    class Disagreeing(OneProcess):
        def reduce(self, tensor, how):
            return tensor + 1

    judged = held_out(num_sample_prompts=0)
    judged.base(resumed=False)
    judged.make_videos = None
    judged.base(resumed=True)
    judged.layout = Disagreeing()
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        judged.base(resumed=True)


def test_processes_that_share_a_base_run_it_equally_often(held_out):
    """The second process has no prompt left when the first makes its second batch."""
    made = {0: [], 1: []}
    for index, calls in made.items():
        one = held_out(num_sample_prompts=0)
        one.layout = type("Layout", (OneProcess,), {"num_processes": 2, "process_index": index, "in_step": True})()
        one.evaluate("x", 0, lambda prompts, noise, calls=calls: calls.append(prompts) or make_videos(prompts, noise))
    assert len(made[0]) == len(made[1]) == 4


def test_samples_are_videos_with_their_prompts_made_in_batches(held_out, tmp_path):
    made, sampler = [], held_out()
    sampler.make_videos = lambda prompts, noise: made.append(len(prompts)) or make_videos(prompts, noise)
    sampler.sample(7)
    assert made == [2, 1]
    folder = tmp_path / "samples" / "step-000007"
    assert sorted(p.name for p in folder.iterdir()) == ["00.mp4", "01.mp4", "02.mp4", "prompts.txt"]
    assert (folder / "prompts.txt").read_text().splitlines()[1] == "01\tprompt 1"


def test_no_samples_are_made_where_none_are_asked_for(held_out, tmp_path):
    held_out(num_sample_prompts=0).sample(7)
    held_out(num_sample_prompts=9).sample(8)
    assert len(list((tmp_path / "samples" / "step-000008").glob("*.mp4"))) == 5, "there are no more"
    assert not (tmp_path / "samples" / "step-000007").exists()


def test_means_leave_out_what_was_not_measured():
    evaluation = Evaluation(["a"], {"x": torch.tensor([2.0]), "diversity": torch.zeros(0)}, torch.zeros(0))
    assert evaluation.means() == {"x": 2.0}


@pytest.mark.parametrize("spec", ["other=own.py:score", "own:score"])
@pytest.mark.parametrize("setting", ["reward_funcs", "eval_reward_funcs"])
def test_scores_of_the_base_are_of_a_rewards_code_as_it_is(setting, spec, make_args, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own.py").write_text("def score(video, prompts, **info):\n    return video.mean((1, 2, 3, 4))\n")
    args = make_args(base_dir=str(tmp_path), **{setting: [spec]})
    before = fingerprint(args, EVAL_FINGERPRINT)
    assert fingerprint(args, EVAL_FINGERPRINT) == before
    (tmp_path / "own.py").write_text("def score(video, prompts, **info):\n    return -video.mean((1, 2, 3, 4))\n")
    assert fingerprint(args, EVAL_FINGERPRINT) != before
    assert "sources" not in fingerprint(make_args(), EVAL_FINGERPRINT), "as earlier runs have it"
