"""Rewards of latents through the whole loop: what they are given, what is decoded, what is refused."""

import pytest
import torch
from runs import adapter, train
from toy_rewards import PROMPTS, redness, rows_without_cost

from rewards import RewardError
from rlhf.config import ConfigError
from rlhf.method.rollout import sample_euler
from rlhf.trainer import RewardGradientTrainer


class Quiet:
    """Prefers latents near 0; notes what it was given."""

    space, name = "latents", "quiet"

    def __init__(self):
        self.given = []

    def __call__(self, latents, prompts, **info):
        if "probe" not in info:
            self.given.append((latents.detach().clone(), info["sigma"], info["text"].clone(), info["pooled"].clone()))
        return -latents.square().mean((1, 2, 3, 4))


@pytest.mark.parametrize("method", ["draft_k", "nft", "adjoint_matching"])
def test_nothing_is_decoded_in_a_step_whose_rewards_score_latents(make_pipe, make_args, monkeypatch, method):
    monkeypatch.setattr("rlhf.method.decode.decode_video", lambda *_, **__: pytest.fail("decoded"))
    more = {"method_kwargs": {"group_size": 2}} if method == "nft" else {}
    args, quiet = make_args(max_steps=2, method=method, learning_rate=3e-2, **more), Quiet()
    trainer = RewardGradientTrainer(make_pipe(), quiet, args, PROMPTS)
    trainer.train()
    rows = rows_without_cost(args)
    assert rows[0]["reward"] == rows[0]["rewards/quiet"] < 0
    assert "saturated" not in rows[0]
    latents, sigma, text, pooled = quiet.given[0]
    batch = trainer.batches.batch(0, 0)
    cond = trainer.text(batch.prompts, "cpu")
    assert sigma == 0
    assert torch.equal(text, cond.prompt_embeds_BLD)
    assert torch.equal(pooled, cond.pooled_embeds_BP)
    assert latents.shape == (2, *trainer.batches.noise_shape)
    assert adapter(args).abs().sum() > 0


def test_beside_a_reward_of_pixels_both_gradients_add_up(make_args, make_pipe, tmp_path):
    def gradient(rewards, weights):
        args = make_args(output_dir=str(tmp_path / str(len(made))), reward_weights=weights)
        trainer = RewardGradientTrainer(make_pipe(), rewards, args, PROMPTS)
        trainer._update = lambda step, norm: made.append(trainer.masters.vector.grad.clone())
        trainer.step(0)
        return made[-1]

    made = []
    latent, pixel, both = (
        gradient([Quiet()], [2.0]),
        gradient([redness], [0.5]),
        gradient([Quiet(), redness], [2.0, 0.5]),
    )
    torch.testing.assert_close(both, latent + pixel, rtol=1e-4, atol=1e-7)
    assert min(latent.norm(), pixel.norm()) > 0.01 * both.norm()


def test_evaluation_and_calibration_score_the_finished_latents(make_args):
    args, quiet = make_args(calibrate_rewards=2, num_eval_prompts=2, max_steps=1, normalise_rewards=True), Quiet()
    train(args, quiet, evaluate=True)
    assert {sigma for _, sigma, _, _ in quiet.given} == {0.0}
    assert len(quiet.given) == 1 + 1 + 2  # calibration, the step, before and after


def test_prfl_scores_states_at_their_noise_level_and_decodes_the_estimate_for_pixels(make_args, make_pipe):
    seen, quiet = [], Quiet()
    pixels = lambda video, prompts, **info: seen.append(video.shape[2]) or redness(video, prompts)
    pixels.name = "pixels"
    trainer = RewardGradientTrainer(make_pipe(), [quiet, pixels], make_args(method="prfl", max_steps=12), PROMPTS)
    trainer.train()
    levels = trainer.sigmas.tolist()
    assert {sigma for _, sigma, _, _ in quiet.given} == set(levels[1:])
    assert seen[-1] == 5
    first = quiet.given[0]
    batch = trainer.batches.batch(0, 0)
    cond = trainer.text(batch.prompts, "cpu")
    states = sample_euler(trainer.fields.base(cond), batch.noise("train"), trainer.sigmas)
    torch.testing.assert_close(first[0], states[levels.index(first[1])])


def test_prfl_needs_a_reward_of_latents_to_train_on(make_args, monkeypatch):
    monkeypatch.setattr("rlhf.training.setup.find_base", lambda *_: pytest.fail("loaded"))
    for rewards, weights in (([redness], [1.0]), ([redness, Quiet()], [1.0, 0.0])):
        with pytest.raises(ConfigError, match="method: got prfl with redness.*rewards.distill"):
            RewardGradientTrainer("nano", rewards, make_args(method="prfl", reward_weights=weights), PROMPTS)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (
            {"method_kwargs": {"relative_words": ["good", "bad"]}},
            "relative_words: got .* with the reward quiet of latents",
        ),
        ({"method_kwargs": {"reward_perturbation": 0.01}}, "reward_perturbation: got 0.01"),
        ({"balance_reward_gradients": True}, "balance_reward_gradients: got True"),
    ],
)
def test_settings_of_pixels_are_refused_before_the_model_is_loaded(make_args, monkeypatch, settings, part):
    monkeypatch.setattr("rlhf.training.setup.find_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=part):
        RewardGradientTrainer("nano", Quiet(), make_args(**settings), PROMPTS)


def test_a_reward_may_refuse_the_generator(make_args, make_pipe, monkeypatch):
    seen, quiet = [], Quiet()

    def check_generator(name, digest):
        seen.append((name, digest))
        if len(set(seen)) > 1:
            raise RewardError("quiet", got=name, expected="the first one", cure="use that")

    quiet.check_generator = check_generator
    for _ in range(2):
        RewardGradientTrainer(make_pipe(), quiet, make_args(), PROMPTS)
    other = make_pipe()
    other.transformer.proj_out.weight.data[0, 0] += 1e-3
    with pytest.raises(RewardError, match="expected the first one"):
        RewardGradientTrainer(other, quiet, make_args(), PROMPTS)


def test_a_gradient_that_is_not_finite_is_told_of_its_reward(make_args):
    class Broken(Quiet):
        def __call__(self, latents, prompts, **info):
            scores = super().__call__(latents, prompts, **info)
            return scores if "probe" in info else scores + (latents[:, 0, 0, 0, 0] * 0).sqrt()

    with pytest.raises(RuntimeError, match="it comes from the reward quiet"):
        train(make_args(), Broken())
