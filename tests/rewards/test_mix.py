"""Mixing: weights, normalisation, frames, the breakdown, and errors that name reward and prompt."""

import os
import random
import sys

import numpy
import pytest
import torch

from rewards import RewardError, RewardMix, frames_needed

PROMPTS = ["a red circle", "a blue square"]


class Mean:
    def __init__(self, gain=1.0, **attributes):
        self.gain, self.seen = gain, []
        self.__dict__.update(attributes)

    def __call__(self, video, prompts, **info):
        self.seen.append((video.shape[2], video.requires_grad, torch.is_grad_enabled(), info))
        return self.gain * video.mean(dim=(1, 2, 3, 4))


@pytest.fixture
def video():
    return torch.rand(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_the_total_is_the_weighted_sum_and_the_breakdown_is_raw(video):
    total, breakdown = RewardMix({"a": Mean(1.0), "b": Mean(10.0)}, [2.0, -0.5])(video, PROMPTS)
    mean = video.mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(total, 2.0 * mean - 0.5 * 10.0 * mean)
    torch.testing.assert_close(breakdown["a"], mean.detach())
    torch.testing.assert_close(breakdown["b"], 10 * mean.detach())
    assert not any(scores.requires_grad for scores in breakdown.values())
    grad = torch.autograd.grad(total.sum(), video)[0]
    torch.testing.assert_close(grad, torch.full_like(grad, -3.0 / video[0].numel()))


def test_the_lowest_reward_of_each_video_is_its_total(video):
    rewards = {"a": Mean(1.0), "b": lambda video, prompts, **info: video[:, 0].mean((1, 2, 3)), "told": Mean(-9.0)}
    total, breakdown = RewardMix(rewards, [1.0, 2.0, 0.0], lowest=True)(video, PROMPTS)
    torch.testing.assert_close(total, torch.minimum(breakdown["a"], 2 * breakdown["b"]))
    started, _ = RewardMix(rewards, [1.0, 2.0, 0.0], lowest=True).start(video, PROMPTS)()
    assert torch.equal(started, total)
    grad = torch.autograd.grad(total.sum(), video)[0]
    for i in range(2):
        is_a = breakdown["a"][i] < 2 * breakdown["b"][i]
        assert (grad[i, 1].abs().sum() > 0) == is_a, "the other reward has no say"


def test_weights_default_to_one(video):
    total, _ = RewardMix({"a": Mean(1.0), "b": Mean(2.0)})(video, PROMPTS)
    torch.testing.assert_close(total, 3.0 * video.mean(dim=(1, 2, 3, 4)))


def test_normalisation_by_stated_mean_and_std(video):
    rewards = {"stated": Mean(mean=0.25, std=0.1), "silent": Mean(mean=9.0)}  # a mean alone states nothing
    mean = video.mean(dim=(1, 2, 3, 4))
    total, breakdown = RewardMix(rewards, [1.0, 3.0])(video, PROMPTS)
    torch.testing.assert_close(total, (mean - 0.25) / 0.1 + 3 * mean)
    torch.testing.assert_close(breakdown["stated"], mean.detach())
    total, _ = RewardMix(rewards, [1.0, 3.0], normalise=False)(video, PROMPTS)
    torch.testing.assert_close(total, 4 * mean)


# ---------------------------------------- caps and targets


def gradient(mix, video):
    """d total_i / d video_i at one pixel, times the number of pixels: d total / d mean level."""
    total, _ = mix(video, PROMPTS)
    return torch.autograd.grad(total.sum(), video)[0].flatten(1)[:, 0] * video[0].numel()


@pytest.fixture
def two_levels():
    """Two videos, of mean level .25 and .75."""
    return torch.tensor([0.25, 0.75]).reshape(2, 1, 1, 1, 1).expand(2, 3, 2, 4, 4).clone().requires_grad_()


def test_nothing_is_learnt_above_a_cap(two_levels):
    mix = RewardMix({"a": Mean(), "b": Mean()}, [1.0, 2.0], caps={"a": 0.5})
    total, breakdown = mix(two_levels, PROMPTS)
    torch.testing.assert_close(total, torch.tensor([0.25 + 2 * 0.25, 0.5 + 2 * 0.75]))
    assert breakdown["a"].tolist() == pytest.approx([0.25, 0.75]), "the breakdown stays raw"
    torch.testing.assert_close(gradient(mix, two_levels), torch.tensor([3.0, 2.0]))


def test_a_target_is_approached_from_both_sides(two_levels):
    mix = RewardMix({"a": Mean()}, targets={"a": 0.6})
    torch.testing.assert_close(mix(two_levels, PROMPTS)[0], torch.tensor([-0.35, -0.15]))
    torch.testing.assert_close(gradient(mix, two_levels), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    ("settings", "expected"), [({"caps": {"a": 0.5}}, [0.5, 3.0]), ({"targets": {"a": 0.6}}, [-3.5, -1.5])]
)
def test_caps_and_targets_are_in_raw_units_and_normalised_after(two_levels, settings, expected):
    mix = RewardMix({"a": Mean(mean=0.2, std=0.1)}, **settings)
    torch.testing.assert_close(mix(two_levels, PROMPTS)[0], torch.tensor(expected))


# ---------------------------------------- calibration


def test_measured_statistics_replace_the_stated_ones(two_levels):
    mix = RewardMix({"a": Mean(mean=9.0, std=9.0), "silent": Mean(2.0)}, [1.0, 1.0])
    base = torch.tensor([0.0, 1.0, 2.0, 5.0])
    mix.calibrate({"a": base, "silent": 10 * base})
    mean, std = 2.0, (14 / 3) ** 0.5  # squared differences 4, 1, 0, 9 over n - 1
    assert mix.statistics["a"] == pytest.approx((mean, std))
    level = torch.tensor([0.25, 0.75])
    torch.testing.assert_close(mix(two_levels, PROMPTS)[0], (level - mean) / std + (2 * level - 10 * mean) / (10 * std))


def test_calibrated_scores_of_the_samples_have_mean_0_and_deviation_1():
    video = torch.rand(6, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    mix = RewardMix({"a": Mean(7.0)})
    mix.calibrate(mix(video, PROMPTS * 3)[1])
    total, _ = mix(video, PROMPTS * 3)
    assert total.mean().abs() < 1e-4
    assert total.std().item() == pytest.approx(1.0, abs=1e-4)


def test_a_reward_that_is_constant_on_the_samples_is_named():
    mix = RewardMix({"fine": Mean(), "flat": Mean(), "logged": Mean()}, [1.0, 1.0, 0.0])
    fine = torch.tensor([0.0, 1.0])
    with pytest.raises(RewardError, match="'flat': got a standard deviation of 0.0 over 2 base samples"):
        mix.calibrate({"fine": fine, "logged": torch.ones(2), "flat": torch.ones(2)})
    rounded = torch.tensor([1.0, 1.0 - 2**-24])
    with pytest.raises(RewardError, match="'flat': got a standard deviation of .* expected scores that differ"):
        mix.calibrate({"flat": rounded})
    mix.calibrate({"fine": rounded - 1})


# ---------------------------------------- balanced gradients


class Steep(Mean):
    """Another direction for each gain, and far steeper."""

    def __call__(self, video, prompts, **info):
        ramp = torch.linspace(-1, 1, video[0].numel(), dtype=video.dtype).reshape(video[0].shape)
        return 1000 * self.gain * (video * ramp).square().mean(dim=(1, 2, 3, 4))


def pixel_gradients(mix, video):
    total, _ = mix(video, PROMPTS)
    return torch.autograd.grad(total.sum(), video)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_balanced_gradients_have_the_length_of_their_weight(video, dtype):
    video = video.detach().to(dtype).requires_grad_()
    rewards = {"a": Mean(), "b": Steep(mean=3.0, std=7.0)}
    plain = [pixel_gradients(RewardMix({name: reward}), video) for name, reward in rewards.items()]
    unit = [grad / grad.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1, 1) for grad in plain]
    balanced = pixel_gradients(RewardMix(rewards, [0.5, -2.0], balance=True), video)
    torch.testing.assert_close(balanced, 0.5 * unit[0] - 2.0 * unit[1], rtol=1e-4, atol=1e-6)


def test_balancing_changes_no_score(video):
    rewards = {"a": Mean(), "b": Steep(), "logged": Mean(3.0)}
    plain, balanced = (
        RewardMix(rewards, [0.5, 2.0, 0.0], balance=balance)(video, PROMPTS) for balance in (False, True)
    )
    assert torch.equal(plain[0], balanced[0])
    assert all(torch.equal(plain[1][name], balanced[1][name]) for name in rewards)
    with torch.no_grad():
        assert torch.equal(RewardMix(rewards, [0.5, 2.0, 0.0], balance=True)(video, PROMPTS)[0], plain[0])


def test_balanced_samples_know_nothing_of_their_neighbours(video):
    mix = RewardMix({"a": Mean(), "b": Steep()}, balance=True)
    single = torch.cat([pixel_gradients_of_one(mix, video[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(pixel_gradients(mix, video), single)


def pixel_gradients_of_one(mix, video):
    pixels = video.detach().requires_grad_()
    return torch.autograd.grad(mix(pixels, PROMPTS[:1])[0].sum(), pixels)[0]


def test_the_gradient_of_a_capped_sample_stays_zero(two_levels):
    mix = RewardMix({"a": Mean()}, caps={"a": 0.5}, balance=True)
    grad = pixel_gradients(mix, two_levels).flatten(1)
    assert grad[0].norm().item() == pytest.approx(1.0, abs=1e-5)
    assert (grad[1] == 0).all()


def test_a_gradient_that_is_not_finite_can_not_be_balanced_and_names_its_prompt(video):
    def edge(video, prompts, **info):
        return (video.mean(dim=(1, 2, 3, 4)) * torch.tensor([1.0, 0.0])).sqrt()

    with pytest.raises(RewardError, match="'edge': got a gradient of norm nan at the pixels for .* 'a blue square'"):
        RewardMix({"edge": edge}, balance=True)(video, PROMPTS)


@pytest.mark.parametrize("balance", [False, True])
def test_a_trained_reward_that_has_lost_its_gradient_is_named_and_only_in_training(video, balance):
    mix = RewardMix({"a": Mean(), "kept": lambda v, p, **info: v.mean((1, 2, 3, 4)).detach()}, balance=balance)
    with pytest.raises(RewardError, match="'kept': got scores without a gradient in this step; expected a gradient"):
        mix(video, PROMPTS)
    with torch.no_grad():
        mix(video, PROMPTS)
    mix(video.detach(), PROMPTS)


def test_balancing_goes_through_what_made_the_video():
    """The gradient reaches the weights behind the video, scaled by the loss of the total."""
    weight = torch.tensor(0.3, requires_grad=True)
    pattern = torch.rand(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    total, _ = RewardMix({"a": Mean()}, balance=True)(weight * pattern, PROMPTS)
    (total.mean() * 5).backward()
    unit = torch.full_like(pattern, pattern[0].numel() ** -0.5)
    torch.testing.assert_close(weight.grad, 5 / 2 * (unit * pattern).sum())


# ---------------------------------------- frames, info, precision


def test_each_reward_sees_only_the_frames_it_asked_for(video):
    rewards = {"first": Mean(frames="first"), "three": Mean(frames=3), "all": Mean(frames="all")}
    RewardMix(rewards)(video, PROMPTS)
    assert [reward.seen[0][0] for reward in rewards.values()] == [1, 3, 5]
    _, breakdown = RewardMix(rewards)(video, PROMPTS)
    torch.testing.assert_close(breakdown["three"], video[:, :, :3].mean(dim=(1, 2, 3, 4)).detach())  # leading ones


@pytest.mark.parametrize(
    ("asked", "needed"), [(["first"], 1), (["first", 3], 3), ([2, "all"], 17), (["first", "first"], 1)]
)
def test_the_mix_asks_for_the_most_frames(asked, needed):
    assert frames_needed(RewardMix({str(i): Mean(frames=f) for i, f in enumerate(asked)}), 17) == needed


def test_info_is_passed_on(video):
    reward = Mean()
    RewardMix({"a": reward})(video, PROMPTS, fps=24, step=3)
    assert reward.seen[0][3] == {"fps": 24, "step": 3, "rows": [{"prompt": prompt} for prompt in PROMPTS]}


def test_weight_zero_is_logged_without_gradient(video):
    silent = Mean()
    total, breakdown = RewardMix({"a": Mean(), "b": silent}, [1.0, 0.0])(video, PROMPTS)
    torch.testing.assert_close(total, video.mean(dim=(1, 2, 3, 4)))
    assert silent.seen[0][2] is False
    assert "b" in breakdown


def test_half_precision_scores_are_summed_in_float32(video):
    class Half:
        def __call__(self, video, prompts, **info):
            return video.mean(dim=(1, 2, 3, 4)).bfloat16()

    total, breakdown = RewardMix({"a": Half(), "b": Mean(1e-3)})(video, PROMPTS)
    assert total.dtype == breakdown["a"].dtype == torch.float32
    assert (total - breakdown["a"]).abs().min() > 1e-4


def test_float64_stays_float64(video):
    total, _ = RewardMix({"a": Mean()})(video.double(), PROMPTS)
    assert total.dtype == torch.float64


def test_an_evaluation_reward_can_not_be_trained_on(video):
    mix = RewardMix({"judge": Mean(differentiable=False)})
    with pytest.raises(RewardError, match="judge.*eval_reward_funcs"):
        mix(video, PROMPTS)
    with torch.no_grad():
        mix(video, PROMPTS)
    RewardMix({"judge": Mean(differentiable=False)}, [0.0])(video, PROMPTS)


def test_modules_are_moved():
    module = torch.nn.Linear(1, 1)
    assert RewardMix({"a": module, "b": Mean()}).to("meta") is not None
    assert module.weight.device.type == "meta"


NOISE = torch.rand(2, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("scores", "got"),
    [
        (lambda video: video.mean(), r"shape \(\)"),
        (lambda video: video.mean(dim=(1, 2, 3, 4)) / torch.tensor([1.0, 0.0]), "inf for prompt 'a blue square'"),
    ],
)
def test_bad_scores_name_the_reward(scores, got):
    with pytest.raises(RewardError, match=got) as caught:
        RewardMix({"fine": Mean(), "broken": lambda video, prompts, **info: scores(video)})(NOISE, PROMPTS)
    assert "'broken'" in str(caught.value)


def test_a_model_that_has_diverged_is_told_from_a_reward_that_breaks():
    pixels = NOISE.clone()
    pixels[1] *= torch.nan
    with pytest.raises(RewardError, match="nan for prompt 'a blue square', and pixels that are no numbers.*diverged"):
        RewardMix({"fine": Mean()})(pixels, PROMPTS)
    with pytest.raises(RewardError, match=r"nan for prompt 'a red circle'; .*division by zero"):
        RewardMix({"broken": lambda video, prompts, **info: Mean()(video, prompts) * torch.nan})(pixels, PROMPTS)


@pytest.mark.parametrize(("names", "weights"), [("ab", [1.0]), ("a", [1.0, 1.0]), ("", []), ("", None)])
def test_weights_that_do_not_fit_the_rewards(names, weights):
    with pytest.raises(ValueError, match="reward_weights"):
        RewardMix({name: Mean() for name in names}, weights)


def test_limits_that_do_not_fit_the_rewards():
    for key in ("caps", "targets"):
        with pytest.raises(ValueError, match=f"{key}: got 'flikcer', expected one of flicker"):
            RewardMix({"flicker": Mean()}, **{key: {"flikcer": 0.9}})
    with pytest.raises(ValueError, match="caps: got nan for 'flicker', expected a finite number"):
        RewardMix({"flicker": Mean()}, caps={"flicker": float("nan")})
    with pytest.raises(ValueError, match="got flicker in both, expected each in one"):
        RewardMix({"flicker": Mean()}, caps={"flicker": 0.9}, targets={"flicker": 0.8})


def in_place(video, prompts, **info):
    video[:, 1] = 0


def in_place_without_gradient(video, prompts, **info):
    with torch.no_grad():
        video.clamp_(0.4, 0.6)


def through_data(video, prompts, **info):
    video.data.copy_(video.data.flip(-1))  # as a sum would not see


def the_last_frame(video, prompts, **info):
    video.data[:, :, -1] *= 0.9


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("harm", [in_place, in_place_without_gradient, through_data, the_last_frame])
def test_a_reward_that_changes_the_video_is_named(video, harm, trained):
    def reward(video, prompts, **info):
        harm(video, prompts)
        return video.mean(dim=(1, 2, 3, 4))

    mix, given = RewardMix({"harm": reward, "fine": Mean()}, [float(trained), 1.0]), video * 1  # no leaf, as decoded
    with torch.set_grad_enabled(trained), pytest.raises(RewardError, match="'harm': got a video that .* changed"):
        mix(given, PROMPTS)
    with torch.inference_mode(), pytest.raises(RewardError, match="'harm': got a video that .* changed"):
        mix(torch.rand(video.shape), PROMPTS)


def test_prompts_info_and_the_process_stay_as_they_are(video, tmp_path, monkeypatch):
    """Whatever a reward does to them: the next one, and the run, see none of it."""
    monkeypatch.chdir(tmp_path.parent)
    seen, rows, argv = [], [{"camera": "still"}], sys.argv[:]

    def harm(video, prompts, rows, **info):
        scores = video.mean(dim=(1, 2, 3, 4))
        prompts[0], rows[0]["camera"] = "photo of it", "moves"
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        os.chdir(tmp_path)
        sys.argv.append("--harm")
        for seed in (torch.manual_seed, random.seed, numpy.random.seed):
            seed(0)
        return scores

    def fine(video, prompts, rows, **info):
        seen.append((prompts, rows, torch.is_grad_enabled(), torch.zeros(1).dtype, torch.zeros(1).device.type))
        return video.mean(dim=(1, 2, 3, 4))

    def drawn():
        return torch.rand(1).item(), random.random(), numpy.random.rand()

    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(7)
    first = drawn()
    for seed in (torch.manual_seed, random.seed, numpy.random.seed):
        seed(7)
    RewardMix({"harm": harm, "fine": fine})(video, PROMPTS, rows=rows)
    assert seen == [(PROMPTS, [{"camera": "still"}], True, torch.float32, "cpu")]
    assert (os.getcwd(), sys.argv, drawn()) == (str(tmp_path.parent), argv, first)


def test_what_a_reward_raises_names_it_and_the_prompts():
    def fragile(video, prompts, **info):
        raise KeyError("no such word")

    with pytest.raises(
        RewardError,
        match=r"'fragile': got KeyError: 'no such word' for the prompts \['a cat'\] \(.*test_mix.py, line \d+\)",
    ) as caught:
        RewardMix({"fragile": fragile})(torch.rand(1, 3, 1, 8, 8), ["a cat"])
    assert isinstance(caught.value.__cause__, KeyError)
