"""The rollout samples what the pipeline samples, and its noise belongs to the sample alone."""

import torch

from rlhf.contentv.pipeline import flow_sigmas
from rlhf.sampler import draw_noise, rollout, velocity_field
from rlhf.text import encode_prompts


def test_rollout_equals_the_pipeline(tiny_pipe):
    noise, prompts = draw_noise((16, 2, 4, 4), 0, "test", [(0,), (1,)]), ["a cat", "rain"]
    cond = encode_prompts(tiny_pipe, prompts, "ugly", 24)(prompts, "cpu")
    velocity = velocity_field(tiny_pipe.transformer, cond, 2.5)
    latents = rollout(velocity, noise, flow_sigmas(tiny_pipe.scheduler, 3), [])
    expected = tiny_pipe(
        prompts,
        negative_prompt=["ugly", "ugly"],
        latents=noise,
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=2.5,
        max_sequence_length=24,
        output_type="latent",
    ).frames
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_the_window_changes_no_latent_and_ends_in_a_graph(tiny_pipe):
    noise = draw_noise((16, 2, 4, 4), 0, "test", [(0,)])
    cond = encode_prompts(tiny_pipe, ["rain"], "", 24)(["rain"], "cpu")
    tiny_pipe.transformer.proj_out.requires_grad_(True)
    sigmas = flow_sigmas(tiny_pipe.scheduler, 4)
    velocity = velocity_field(tiny_pipe.transformer, cond, 3.0)
    plain = rollout(velocity, noise, sigmas, [])
    windowed = rollout(velocity, noise, sigmas, [2, 3])
    assert torch.equal(plain, windowed)
    assert windowed.requires_grad
    assert not plain.requires_grad
    assert windowed.dtype == torch.float32


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    shape = (16, 2, 4, 4)
    both = draw_noise(shape, 7, "train", [(3, 0), (3, 1)])
    assert torch.equal(both[1:], draw_noise(shape, 7, "train", [(3, 1)]))
    others = [(7, "train", (4, 1)), (8, "train", (3, 1)), (7, "evaluation", (3, 1))]
    for seed, purpose, key in others:
        assert not torch.allclose(both[1:], draw_noise(shape, seed, purpose, [key]))
    many = draw_noise(shape, 7, "train", [(0, i) for i in range(64)])
    assert abs(many.mean().item()) < 0.02
    assert abs(many.std().item() - 1) < 0.02
