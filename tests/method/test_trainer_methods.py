"""Methods and drift through the whole loop on a tiny pipeline: what is exact stays exact."""

import pytest
import torch
from peft import LoraConfig
from runs import adapter, train
from tiny import tiny_pipeline
from tiny_wan import tiny_wan_pipeline
from toy_rewards import PROMPTS, ROBUST, brightness, calm, redness, rows_without_cost

from rlhf.generator import wan_decoder
from rlhf.generator.flow import guided_velocity
from rlhf.method.rollout import draw_noise
from rlhf.trainer import RewardGradientTrainer

ANCHORED = {"drift_weight": 0.1, "anchor_steps": 2}
OF_TEXT = {"guidance_gradient": "text"}


def rewards_of(method: str) -> list:
    return [redness, calm] if method == "prfl" else [redness]


@pytest.mark.parametrize(
    ("make_pipe", "settings"),
    [
        (tiny_pipeline, {"method": "draft_lv", "method_kwargs": {"negative_drift_weight": 0.1}}),
        (tiny_wan_pipeline, {"method": "drtune", "num_grad_steps": 2, "method_kwargs": {"jump_steps": 2}} | ANCHORED),
        (tiny_pipeline, {"method": "srpo", "method_kwargs": {"relative_words": ["good", "bad"]}} | OF_TEXT),
        (tiny_wan_pipeline, {"method": "leap_align", "drift_weight": 0.1}),
        (tiny_pipeline, {"method": "adjoint_matching", "method_kwargs": {"reward_scale": 0.1}}),
        (tiny_wan_pipeline, {"method": "prfl", "reward_weights": [1.0, 0.5], "drift_weight": 0.1}),
    ],
)
def test_accumulated_batches_equal_one_large_batch_with_every_method(make_pipe, make_args, tmp_path, settings):
    """Choices belong to the step and noise to the sample: neither batches nor processes matter."""
    settings |= {"adam_epsilon": 1e-4, "max_steps": 2}  # else AdamW makes whole steps of what is rounding
    many = make_args(output_dir=str(tmp_path / "a"), gradient_accumulation_steps=2, **settings)
    one = make_args(output_dir=str(tmp_path / "b"), per_device_train_batch_size=4, **settings)
    for args in (many, one):
        train(args, rewards_of(settings["method"]), pipe=make_pipe())
    for row, other in zip(rows_without_cost(many), rows_without_cost(one), strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    torch.testing.assert_close(adapter(many), adapter(one), rtol=1e-3, atol=3e-5)


def test_drift_is_logged_and_held_down_by_its_weight(make_args, tmp_path):
    drifts = []
    for weight in (1e-6, 30.0):
        args = make_args(output_dir=str(tmp_path / str(weight)), max_steps=8, drift_weight=weight, learning_rate=3e-2)
        train(args)
        rows = rows_without_cost(args)
        found = [row["drift"] for row in rows]
        assert found[0] == 0
        assert rows[3]["loss"] == pytest.approx(weight * found[3] - rows[3]["reward"], rel=1e-5)
        drifts.append(sum(found[-3:]))
    assert drifts[1] < 0.5 * drifts[0]


def test_an_anchor_step_asks_no_reward_and_pulls_back_to_the_base(tiny_pipe, make_args):
    asked = []

    def counted(video, prompts, **info):
        asked.append("probe" not in info)
        return redness(video, prompts)

    args = make_args(max_steps=6, anchor_steps=3, learning_rate=3e-2)
    trainer = RewardGradientTrainer(tiny_pipe, counted, args, PROMPTS)
    trainer.train()
    assert sum(asked) == 4
    of_anchors = [row for row in rows_without_cost(args) if "reward" not in row]
    assert [row["step"] for row in of_anchors] == [3, 6]
    assert all(row["loss"] == row["drift"] > 0 for row in of_anchors)

    # Descending the anchor's gradient brings the tuned model nearer to the base.
    before = trainer.step(8)["drift"]
    for _ in range(20):
        after = trainer.step(8)["drift"]
    assert after < 0.5 * before


def test_distillation_teaches_the_unguided_adapter_the_guided_base(make_args):
    faint = lambda video, prompts, **info: redness(video, prompts) * 1e-3
    distill = {"guidance_gradient": "distill", "drift_weight": 10.0, "learning_rate": 1e-2}
    args = make_args(max_steps=25, num_sample_prompts=0, **distill)
    trainer = RewardGradientTrainer(tiny_wan_pipeline(), faint, args, PROMPTS, PROMPTS)
    base = trainer.pipe.transformer
    trainer.train()
    found = [row["drift"] for row in rows_without_cost(args)]
    assert sum(found[-5:]) < 0.8 * sum(found[:5])

    # The base is sampled with guidance, the tuned model without.
    noise = draw_noise(trainer.batches.noise_shape, 0, "test", [(0,)])
    cond = trainer.text(PROMPTS[:1], "cpu")
    sigma = trainer.sigmas[0]
    with torch.no_grad():
        assert torch.equal(trainer.fields.tuned(cond)(noise, sigma), guided_velocity(base, noise, sigma, cond, 1.0))
        guided = trainer.fields.base(cond)(noise, sigma)
        base.disable_adapters()
        assert torch.equal(guided, guided_velocity(base, noise, sigma, cond, args.guidance_scale or 3.0))


def test_dora_trains_in_the_loop(make_pipe, make_args):
    args = make_args(max_steps=2, drift_weight=0.1)
    config = LoraConfig(r=2, target_modules=["to_q"], use_dora=True)
    RewardGradientTrainer(make_pipe(), redness, args, PROMPTS, peft_config=config).train()
    assert rows_without_cost(args)[1]["drift"] > 0
    assert adapter(args).isfinite().all()


@pytest.mark.parametrize(
    ("make_pipe", "settings"),
    [(tiny_pipeline, {"num_grad_steps": 3}), (tiny_wan_pipeline, {"method": "adjoint_matching"})],
)
def test_a_robust_step_takes_the_gradient_at_the_adapter_moved_up_its_loss(
    make_pipe, make_args, tmp_path, settings, monkeypatch
):
    """Two plain gradients, the second at the moved adapter, are one robust one."""
    monkeypatch.setattr(wan_decoder, "clamp_straight_through", lambda video, low, high: video)  # for the difference

    def trainer(name, **more):
        args = make_args(output_dir=str(tmp_path / name), method_kwargs=more, **settings)
        made = RewardGradientTrainer(make_pipe(), redness, args, PROMPTS)
        noise = torch.randn(made.masters.vector.shape, generator=torch.Generator().manual_seed(0))
        made.masters.set(0.1 * noise)
        made._update = lambda step, norm: gradients.append(made.masters.vector.grad.clone())
        return made

    gradients = []
    robust, plain = trainer("robust", weight_perturbation=0.3), trainer("plain")
    before = robust.masters.vector.detach().clone()
    row = robust.step(0)
    assert torch.equal(robust.masters.vector, before)
    assert torch.equal(robust.masters.params[0].flatten(), before[: robust.masters.params[0].numel()])
    expected = plain.step(0)
    assert row["reward"] == expected["reward"], "what is logged is of the adapter itself"
    first = gradients[-1]
    plain.masters.vector.grad.zero_()
    plain.masters.set(before + 0.3 * first / first.norm())
    moved = plain.step(0)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-4, atol=1e-6)
    assert row["grad_norm"] == pytest.approx(moved["grad_norm"], rel=1e-5)
    assert (gradients[2] - first).norm() > 0.01 * first.norm()
    if "method" not in settings:  # of all steps: the loss's finite difference at the moved adapter
        assert moved["loss"] > expected["loss"], "it is the worse adapter"
        ends, at, unit = [], plain.masters.vector.detach().clone(), gradients[0] / gradients[0].norm()
        for shift in (1e-2, -1e-2):
            plain.masters.vector.grad.zero_()
            plain.masters.set(at + shift * unit)
            ends.append(plain.step(0)["loss"])
        assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(gradients[0].norm().item(), rel=1e-3)


@pytest.mark.parametrize(
    ("make_pipe", "rewards", "settings"),
    [
        (tiny_pipeline, [redness, brightness], ROBUST | {"method": "leap_align"}),
        (tiny_wan_pipeline, [redness, brightness], ROBUST | {"method": "adjoint_matching"}),
        (tiny_pipeline, [redness, calm], {"method": "prfl", "method_kwargs": {"weight_perturbation": 0.1}}),
    ],
)
def test_a_resumed_run_is_the_whole_run_to_the_bit(make_pipe, make_args, tmp_path, rewards, settings):
    whole = make_args(output_dir=str(tmp_path / "whole"), max_steps=3, save_steps=2, **settings)
    train(whole, rewards, pipe=make_pipe())
    again = f"{whole.output_dir}/checkpoints/step-2"
    rest = make_args(output_dir=str(tmp_path / "rest"), max_steps=3, resume_from_checkpoint=again, **settings)
    train(rest, rewards, pipe=make_pipe())
    rest = make_args(output_dir=str(tmp_path / "rest"))
    assert torch.equal(adapter(rest), adapter(whole))
    assert rows_without_cost(rest) == rows_without_cost(whole)[2:]
