"""The sampler equals a straight-line implementation; the call has the published signature."""

import inspect
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from straight_line import guided_sample
from tiny import SAMPLING, tiny_conditioning, tiny_pipeline, tiny_transformer

from rlhf.contentv.pipeline import ContentVPipeline
from rlhf.generator.files import SamplingDefaults
from rlhf.generator.flow import euler_step, flow_sigmas, guided_velocity
from rlhf.generator.wan_decoder import decode_video

PROMPT = "a red circle"
PUBLISHED_SIGNATURE = {
    "prompt": None,
    "prompt_2": None,
    "prompt_3": None,
    "height": 432,
    "width": 768,
    "num_frames": 125,
    "num_inference_steps": 50,
    "guidance_scale": 6.0,
    "negative_prompt": None,
    "negative_prompt_2": None,
    "negative_prompt_3": None,
    "num_videos_per_prompt": 1,
    "generator": None,
    "latents": None,
    "prompt_embeds": None,
    "negative_prompt_embeds": None,
    "pooled_prompt_embeds": None,
    "negative_pooled_prompt_embeds": None,
    "output_type": "np",
    "return_dict": True,
    "joint_attention_kwargs": None,
    "clip_skip": None,
    "callback_on_step_end": None,
    "callback_on_step_end_tensor_inputs": ["latents"],
    "max_sequence_length": 256,
}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


def sample(pipe, prompt=PROMPT, seed=0, **changes):
    arguments = SAMPLING.call_arguments() | {"output_type": "latent"} | changes
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **arguments).frames


def test_signature_and_defaults_are_the_published_ones():
    parameters = list(inspect.signature(ContentVPipeline.__call__).parameters.values())[1:]
    assert {p.name: p.default for p in parameters} == PUBLISHED_SIGNATURE
    assert [p.name for p in parameters] == list(PUBLISHED_SIGNATURE)
    assert SamplingDefaults().call_arguments().items() <= (PUBLISHED_SIGNATURE | {"negative_prompt": ""}).items()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 48), (9, 32, 48), (9, 64, 16)])
def test_guided_sample_equals_straight_line(pipe, batch, frames, height, width):
    cond = tiny_conditioning(batch)
    noise = torch.randn(batch, 16, 1 + (frames - 1) // 4, height // 8, width // 8)
    tensors = vars(cond).values()
    names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    size = {"height": height, "width": width, "num_frames": frames, "negative_prompt": None}
    result = sample(pipe, None, latents=noise, **dict(zip(names, tensors, strict=True)), **size)
    model = pipe.transformer
    expected = guided_sample(model.state_dict(), model.config, noise, tensors, num_steps=4, guidance=3.0, shift=3.0)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert (expected - noise).std() > 0.1


def test_flow_sigmas_fall_from_one_to_zero_and_leave_the_scheduler_alone():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = scheduler.sigmas.clone()
    sigmas = flow_sigmas(scheduler, 4)
    expected = [3 * s / (1 + 2 * s) for s in (1, 0.75, 0.5, 0.25, 0)]
    torch.testing.assert_close(sigmas, torch.tensor(expected), atol=1e-6, rtol=0)
    assert torch.equal(scheduler.sigmas, before)
    with pytest.raises(ValueError, match="num_inference_steps=0, expected at least 1"):
        flow_sigmas(scheduler, 0)


@pytest.mark.parametrize(("guidance", "forwards"), [(1.0, 1), (0.0, 1), (1.5, 2)])
def test_guidance_takes_two_forwards_of_the_given_batch(guidance, forwards):
    model, batches = tiny_transformer(), []
    model.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    guided_velocity(model, torch.randn(2, 16, 1, 4, 4), torch.tensor(0.5), tiny_conditioning(2), guidance)
    assert batches == [2] * forwards


def test_guided_velocity_extrapolates_and_has_a_gradient():
    model, cond, sigma = tiny_transformer().double(), tiny_conditioning(1, dtype=torch.float64), torch.tensor(0.5)
    x = torch.randn(1, 16, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    text, negative = (guided_velocity(model, x, sigma, branch, 1.0) for branch in (cond, cond.negative))
    v = guided_velocity(model, x, sigma, cond, 4.0)
    torch.testing.assert_close(v, negative + 4 * (text - negative))
    (grad,) = torch.autograd.grad(v.square().sum(), x)
    assert grad.abs().min() > 0


def test_latents_stay_in_float32_for_a_bfloat16_transformer():
    model, x = tiny_transformer().bfloat16(), torch.randn(1, 16, 1, 4, 4)
    v = guided_velocity(model, x, torch.tensor(0.5), tiny_conditioning(), 2.0)
    assert v.dtype == torch.float32
    assert euler_step(x, v, torch.tensor(0.5), torch.tensor(0.25)).dtype == torch.float32
    expected = guided_velocity(model.float(), x, torch.tensor(0.5), tiny_conditioning(), 2.0)
    torch.testing.assert_close(v, expected, atol=0.1, rtol=0.1)


def test_a_bfloat16_pipeline_keeps_its_latents_in_float32():
    pipe, seen = tiny_pipeline(), []
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        part.to(torch.bfloat16)

    def look(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].dtype)
        return {}

    latents = sample(pipe, callback_on_step_end=look)
    assert set(seen) == {latents.dtype} == {torch.float32}
    assert not torch.equal(latents, latents.bfloat16().float())
    torch.testing.assert_close(latents, sample(tiny_pipeline()), atol=0.2, rtol=0.1)


def test_guidance_without_negative_embeddings_is_refused():
    cond = replace(tiny_conditioning(), negative_embeds_BLD=None)
    with pytest.raises(
        ValueError, match=r"guidance_scale=2.0 .* encode a negative prompt .* or set guidance_scale to 1"
    ):
        guided_velocity(tiny_transformer(), torch.randn(1, 16, 1, 4, 4), torch.tensor(0.5), cond, 2.0)


@pytest.mark.parametrize(("asked", "made"), [(5, 5), (4, 5), (7, 5), (8, 9), (1, 1), (0, 1), (-3, 1)])
def test_num_frames_is_rounded_with_a_warning(pipe, monkeypatch, asked, made):
    warnings = []
    monkeypatch.setattr("rlhf.contentv.pipeline.logger.warning", warnings.append)
    assert sample(pipe, num_frames=asked, num_inference_steps=1, output_type="np").shape == (1, made, 32, 48, 3)
    assert bool(warnings) == (asked != made)


def test_what_a_call_says_of_encoders_and_adapters_reaches_them(monkeypatch):
    pipe, told, scales, freed = tiny_pipeline(), [], [], []
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda **given: told.append(given) or encode(**given))
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, given: scales.append(given["joint_attention_kwargs"]), with_kwargs=True
    )
    scale, noise = {"scale": 0.5}, torch.randn(1, 16, 1, 4, 6, dtype=torch.float64)
    how = {"joint_attention_kwargs": scale, "clip_skip": 1, "max_sequence_length": 12, "latents": noise}
    latents = sample(pipe, num_frames=1, num_inference_steps=1, **how)
    assert {name: told[0][name] for name in ("lora_scale", "clip_skip", "max_sequence_length")} == {
        "lora_scale": 0.5,
        "clip_skip": 1,
        "max_sequence_length": 12,
    }
    assert scales == [scale, scale]
    assert freed == [True]
    assert latents.dtype == torch.float32
    assert not latents.requires_grad, "though the adapter could be trained"
    with pytest.raises(ValueError, match="Cannot forward both"):
        sample(pipe, prompt_embeds=torch.zeros(1, 4, 32))


@pytest.mark.parametrize("size", [{"height": 40}, {"width": 56}])
def test_size_must_be_divisible_by_sixteen(pipe, size):
    with pytest.raises(ValueError, match="divisible by 16"):
        sample(pipe, **size)


def test_output_types_agree(pipe):
    latents = sample(pipe)
    assert latents.shape == (1, 16, 3, 4, 6)
    assert latents.dtype == torch.float32
    as_np, as_pt, as_pil = (sample(pipe, output_type=kind) for kind in ("np", "pt", "pil"))
    assert as_np.shape == (1, 9, 32, 48, 3)
    assert 0 <= as_np.min() < as_np.max() <= 1
    torch.testing.assert_close(as_pt.transpose(1, 2), decode_video(pipe.vae, latents), atol=1e-5, rtol=0)
    np.testing.assert_allclose(as_pt.permute(0, 1, 3, 4, 2).numpy(), as_np, atol=1e-6)
    np.testing.assert_allclose(np.asarray(as_pil[0][3]) / 255, as_np[0, 3], atol=1 / 255)


def test_sampling_is_a_function_of_the_generator_and_the_prompt(pipe):
    torch.testing.assert_close(sample(pipe), sample(pipe), atol=0, rtol=0)
    assert (sample(pipe) - sample(pipe, seed=1)).abs().max() > 0.1
    assert (sample(pipe) - sample(pipe, prompt="two blue squares")).abs().max() > 1e-3
    assert (sample(pipe) - sample(pipe, negative_prompt="blur")).abs().max() > 1e-3


def test_a_generator_per_video_makes_each_video_independent_of_its_batch(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 5)]
    arguments = SAMPLING.call_arguments() | {"output_type": "latent"}
    both = pipe([PROMPT, "a star"], generator=generators, **arguments).frames
    torch.testing.assert_close(both[:1], sample(pipe), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1:], sample(pipe, prompt="a star", seed=5), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="2 generators for a batch of 1"):
        pipe(PROMPT, generator=generators, **arguments)


def test_several_videos_per_prompt(pipe):
    videos = sample(pipe, num_videos_per_prompt=2)
    assert len(videos) == 2
    assert (videos[0] - videos[1]).abs().max() > 0.1


def test_callback_sees_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def zero_the_last(pipe, step, timestep, tensors):
        seen.append((step, round(float(timestep))))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    assert sample(pipe, callback_on_step_end=zero_the_last).abs().max() == 0
    assert seen == [(0, 1000), (1, 900), (2, 750), (3, 500)]


def test_callback_may_interrupt(pipe):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1

    sample(pipe, callback_on_step_end=stop)
    assert steps == [0, 1]


def test_saved_index_loads_in_the_published_code(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ContentVPipeline"
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    assert index["tokenizer_3"] == ["transformers", "T5TokenizerFast"]
    assert "extra_special_tokens" not in json.loads((tmp_path / "tokenizer_3/tokenizer_config.json").read_text())
    assert SamplingDefaults.load(tmp_path) == SAMPLING


def test_sampling_file_with_an_unknown_key_is_refused(tmp_path):
    assert SamplingDefaults.load(tmp_path) == SamplingDefaults()
    (tmp_path / "sampling.json").write_text('{"num_frames": 17, "steps": 3}')
    with pytest.raises(ValueError, match=r"has \['steps'\], expected only .*'num_inference_steps'.*; remove or rename"):
        SamplingDefaults.load(tmp_path)


def test_both_branches_of_guidance_can_be_one_batch():
    model, sizes = tiny_transformer(), []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    x, cond, sigma = torch.randn(2, 16, 2, 4, 6), tiny_conditioning(batch=2), torch.tensor(0.7)
    apart = guided_velocity(model, x, sigma, cond, 3.0)
    together = guided_velocity(model, x, sigma, cond, 3.0, together=True)
    assert sizes == [2, 2, 4]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
