"""Settings about speed in whole runs: the exact ones train the same adapter, the others do what
they say.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from runs import saved_adapter
from tiny import tiny_pipeline, tiny_vae
from toy_rewards import PROMPTS, redness

from rlhf.execution.offload import HostMemory
from rlhf.generator.wan_decoder import decode_video
from rlhf.method.decode import Decoder
from rlhf.trainer import RewardGradientTrainer
from rlhf.training.batches import Batches
from rlhf.training.setup import require_same_run

CHECKPOINTED = {"gradient_checkpointing": True}
DECODED = {"decode_chunk": 1, "decode_checkpoint": True}


def trained(make_args, folder, **settings):
    """The adapter of a run of three steps, and the run."""
    args = make_args(output_dir=str(folder), num_inference_steps=4, num_grad_steps=2, **settings)
    trainer = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS)
    trainer.train()
    return saved_adapter(args), trainer


PLAIN = {}


@pytest.fixture
def plain(make_args, tmp_path):
    """The adapter of a run with default settings, which is made once."""
    if not PLAIN:
        PLAIN.update(trained(make_args, tmp_path / "plain")[0])
    return PLAIN


def distance(found, expected):
    return max((found[name] - t).abs().max().item() for name, t in expected.items())


@pytest.mark.parametrize(
    "settings",
    [
        CHECKPOINTED | {"keep_attention": True, "stepwise_backward": True},
        CHECKPOINTED | {"stream_weights": True, "offload_activations": True},
        DECODED | {"decode_caches": "host", "stepwise_backward": True},
        DECODED | {"guidance_together": True},
    ],
)
def test_exact_settings_train_the_same_adapter(make_args, tmp_path, plain, settings):
    found, _ = trained(make_args, tmp_path / "run", **settings)
    assert max(t.abs().max() for t in plain.values()) > 1e-2
    assert distance(found, plain) < 2e-4  # AdamW turns rounding into steps where a gradient is nearly zero


@pytest.mark.parametrize(
    "settings",
    [
        {"prefix_steps": 1},
        {"rollout_reuse": 2},
        {"decode_window": 2},
        {"vae_dtype": "bfloat16"},
    ],
)
def test_other_settings_train_another_adapter(make_args, tmp_path, plain, settings):
    found, _ = trained(make_args, tmp_path / "run", **settings)
    assert distance(found, plain) > 1e-3
    assert all(t.isfinite().all() for t in found.values())


class Calls:
    """Forward passes of the transformer in each step: with gradient and without."""

    def __init__(self, trainer):
        self.trainer, self.seen = trainer, []
        trainer.pipe.transformer.register_forward_pre_hook(lambda *_: self.seen.append(torch.is_grad_enabled()))

    def of_step(self, step):
        self.seen.clear()
        self.trainer.step(step)
        return self.seen.count(False), self.seen.count(True)


def stepper(make_args, **settings):
    settings = {"num_inference_steps": 4, "num_grad_steps": 1, "max_steps": 8} | settings
    return Calls(RewardGradientTrainer(tiny_pipeline(), redness, make_args(**settings), PROMPTS))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(6, 2)] * 3),
        ({"stepwise_backward": True}, [(8, 2)] * 3),
        ({"prefix_steps": 1}, [(2, 2)] * 3),
        ({"guidance_together": True}, [(3, 1)] * 3),
        ({"rollout_reuse": 3}, [(6, 2), (0, 2), (0, 2), (6, 2)]),
        ({"rollout_reuse": 2, "gradient_accumulation_steps": 2}, [(12, 4), (6, 4), (6, 4), (6, 4)]),
    ],
)
def test_how_often_the_transformer_runs(make_args, settings, expected):
    calls = stepper(make_args, **settings)
    assert [calls.of_step(step) for step in range(len(expected))] == expected


def test_a_rollout_that_is_used_again_keeps_its_prompts_and_noise(make_args):
    trainer, prompts = stepper(make_args, rollout_reuse=2).trainer, []
    text = trainer.text
    trainer.text = lambda given, device: prompts.append(given) or text(given, device)
    for step in range(4):
        trainer.step(step)
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]


def test_a_resumed_run_has_the_prompts_of_the_rollout_in_use(make_args, tmp_path):
    settings = {"rollout_reuse": 4, "max_steps": 2, "save_steps": 2}
    trained(make_args, tmp_path / "run", **settings)
    _, trainer = trained(make_args, tmp_path / "run", **settings | {"max_steps": 3, "resume_from_checkpoint": "latest"})
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("uses", [1, 2])
def test_rollouts_take_up_the_prompts_where_they_left_off_with_other_batches(make_args, uses):
    """Steps that share a rollout take no prompts: 4 steps of 2 videos used the first 8 or 4 places
    of the order.
    """
    args = make_args(per_device_train_batch_size=2, rollout_reuse=uses, max_steps=9)
    larger = dataclasses.replace(args, per_device_train_batch_size=4)
    order = _batches(args).prompts_at(0, 40)
    saved = _batches(args).state(4)
    for settings, size in ((args, 2), (larger, 4)):
        batches = _batches(settings)
        batches.restore(4, saved)
        first = 4 // uses
        found = [batches.batch(rollout, 0).prompts for rollout in (first, first + 1)]
        assert found == [order[2 * first :][:size], order[2 * first + size :][:size]]
        assert batches.prompts_from_rollout(first)[:size] == found[0]
        assert batches.state(4) == saved


def test_two_processes_share_the_samples_of_one(make_args):
    args = make_args(per_device_train_batch_size=2, gradient_accumulation_steps=2, seed=3)
    one = _batches(dataclasses.replace(args, per_device_train_batch_size=4))
    two = [_batches(args, 2, index) for index in range(2)]
    for micro in range(2):
        whole, parts = one.batch(1, micro), [batches.batch(1, micro) for batches in two]
        assert parts[0].prompts + parts[1].prompts == whole.prompts
        assert torch.equal(torch.cat([part.noise("train") for part in parts]), whole.noise("train"))
    assert [batches.samples_before(3) for batches in two] == [one.samples_before(3)] * 2 == [24] * 2
    assert one.prompts_from_rollout(0) == one.prompts_at(0, min(8 * args.max_steps, 2 * len(PROMPTS)))
    assert two[0].state(1)["processes"] == 4, "those that share videos count, too"
    other = _batches(dataclasses.replace(args, seed=4)).batch(1, 0).noise("train")
    assert not torch.allclose(other, two[0].batch(1, 0).noise("train"))


def test_processes_agree_on_prompts_and_settings_but_for_those_of_a_host(make_args):
    found = []
    layout = SimpleNamespace(require_same=lambda **same: found.append(same))
    for changes in ({}, {"output_dir": "there"}, {"seed": 9}):
        require_same_run(layout, PROMPTS, make_args(**changes))
    assert found[0]["prompts"] == [{"prompt": text} for text in PROMPTS]
    assert found[0] == found[1] != found[2]


def _batches(args, processes: int = 1, index: int = 0) -> Batches:
    layout = SimpleNamespace(num_processes=processes, process_index=index, device="cpu")
    layout.accelerator = SimpleNamespace(num_processes=2 * processes)
    size, per_step = args.per_device_train_batch_size, args.gradient_accumulation_steps
    return Batches(PROMPTS, (16, 2, 2, 2), layout, args.seed, size, per_step, args.rollout_reuse, args.max_steps)


def test_the_window_moves_over_the_frames_and_fits():
    def windows(size, seed=0):
        return [Decoder(None, 5, size, seed).window(step) for step in range(40)]

    assert {first for first, _ in windows(2)} == {0, 1, 2, 3}
    assert all(last - first == 2 for first, last in windows(2))
    assert windows(2) == windows(2) != windows(2, seed=9), "the same after a resume"
    assert {*windows(9), *windows(None)} == {(0, 5)}


def test_the_window_is_decoded_in_pieces_as_the_settings_say(monkeypatch):
    calls, caches = [], HostMemory(torch.device("cpu"))
    monkeypatch.setattr("rlhf.method.decode.decode_video", lambda *given: calls.append(given) or decode_video(*given))
    decoder = Decoder(tiny_vae(), 5, window=2, chunk=1, checkpoint=True, caches=caches)
    latents = torch.randn(1, 16, 2, 2, 2)
    for step in range(8):
        first, last = decoder.window(step)
        window = decode_video(decoder.vae, latents)[:, :, first:last]
        torch.testing.assert_close(decoder(latents, step), window, atol=1e-5, rtol=0)
    assert {given[3:5] for given in calls} == {(1, True)}
    assert all(given[6] is caches for given in calls)


def test_what_was_chosen_is_told(make_args, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("rlhf.trainer.RunLog.say", lambda log, text: told.append(text))
    trained(make_args, tmp_path / "run", attention_kernel="flash", max_steps=1)
    assert told == ["attention_kernel: flash"]
