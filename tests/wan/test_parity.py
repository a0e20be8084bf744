"""Wan's velocity, text, sample and video are those of diffusers' own pipeline."""

import diffusers
import pytest
import torch
from tiny import SAMPLING, TEXT_WIDTH
from tiny_wan import CLOSE, euler, save_tiny_wan, stock_wan_pipeline, tiny_wan_pipeline, tiny_wan_transformer

from rlhf.evaluation.sampler import Placement, Sampler
from rlhf.execution.blocks import RECOMPUTE, BlockRunner
from rlhf.generator.flow import euler_step, flow_sigmas, guided_velocity
from rlhf.generator.loading import load_pipeline
from rlhf.generator.text import encode_prompts
from rlhf.generator.wan_decoder import decode_video
from rlhf.run.video import to_uint8
from rlhf.wan.blocks import WAN_BLOCK

PROMPTS = ["a  red &amp; round ball", "two stars"]  # which the pipeline cleans


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_wan(tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize(("batch", "size"), [(1, (1, 4, 4)), (2, (3, 4, 6)), (3, (2, 8, 2))])
def test_velocity_and_gradient_are_those_of_diffusers(batch, size, recompute):
    ours, stock = tiny_wan_transformer(), tiny_wan_transformer(cls=diffusers.WanTransformer3DModel)
    stock.load_state_dict(ours.state_dict())
    ours.run_block = BlockRunner(recompute=recompute, parts=WAN_BLOCK)
    generator = torch.Generator().manual_seed(batch)
    text = torch.randn(batch, 7, TEXT_WIDTH, generator=generator)
    time = torch.rand(batch, generator=generator) * 1000
    x = torch.randn(batch, 16, *size, generator=generator)
    results = []
    for model in (ours, stock):
        for p in model.parameters():
            p.requires_grad_(True)
        latents = x.clone().requires_grad_()
        (v,) = model(hidden_states=latents, encoder_hidden_states=text, timestep=time, return_dict=False)
        v.square().sum().backward()
        results.append([v, latents.grad, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    torch.testing.assert_close(results[0][0], results[1][0], **CLOSE)


@pytest.mark.parametrize(("height", "width", "frames", "count"), [(32, 48, 9, 2), (16, 32, 5, 1), (32, 16, 1, 1)])
def test_guided_sample_and_video_are_those_of_diffusers(folder, height, width, frames, count):
    ours, stock = load_pipeline(folder), euler(stock_wan_pipeline())
    latents = torch.randn(
        count, 16, 1 + frames // 4, height // 8, width // 8, generator=torch.Generator().manual_seed(1)
    )
    sampling = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": 3}
    sampling |= {"guidance_scale": 4.0, "negative_prompt": ["blurry"] * count, "max_sequence_length": 24}
    call = lambda pipe, kind: pipe(PROMPTS[:count], latents=latents, output_type=kind, **sampling).frames
    expected = call(stock, "latent")

    cond = encode_prompts(ours, PROMPTS[:count], "blurry", 24)(PROMPTS[:count], "cpu")
    sigmas, x = flow_sigmas(ours.scheduler, 3), latents
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = euler_step(x, guided_velocity(ours.transformer, x, sigma, cond, 4.0), sigma, sigma_next)
    torch.testing.assert_close(x, expected, **CLOSE)
    torch.testing.assert_close(call(ours, "latent"), expected, **CLOSE)
    video = decode_video(ours.vae, x).transpose(1, 2)
    torch.testing.assert_close(video, call(stock, "pt"), **CLOSE)


def test_text_is_cleaned_and_padded_as_in_diffusers(folder):
    ours, stock = load_pipeline(folder), stock_wan_pipeline()
    expected, _ = stock.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=24)
    embeds, pooled = ours.join_parts({"text_encoder": ours.encode_part("text_encoder", PROMPTS, 24)})
    assert torch.equal(embeds, expected)
    assert pooled.shape == (2, 0)
    assert (embeds[1, len(ours.tokenizer("two stars").input_ids) :] == 0).all()


def test_a_saved_pipeline_loads_here_and_in_diffusers(tmp_path):
    pipe = tiny_wan_pipeline()
    pipe.save_pretrained(tmp_path)
    sampling = pipe.sampling.call_arguments() | {"output_type": "pt"}
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    expected = pipe("rain", latents=noise, **sampling).frames
    loaded = load_pipeline(tmp_path)
    for part in ("transformer", "vae", "text_encoder"):
        weights = getattr(pipe, part).state_dict()
        assert all(torch.equal(x, weights[name]) for name, x in getattr(loaded, part).state_dict().items()), part
    # Not to the bit: a processor's kernels round by where the weights lie in memory.
    torch.testing.assert_close(loaded("rain", latents=noise, **sampling).frames, expected, **CLOSE)
    stock = euler(diffusers.WanPipeline.from_pretrained(tmp_path))
    torch.testing.assert_close(stock("rain", latents=noise, **sampling).frames, expected, **CLOSE)
    assert loaded.sampling == pipe.sampling


def test_in_bfloat16_the_same_weights_stay_float32_as_in_diffusers(folder):
    ours = load_pipeline(folder, dtype=torch.bfloat16)
    stock = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in ours.transformer.named_parameters()}
    assert dtypes == {name: p.dtype for name, p in stock.transformer.named_parameters()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    inputs = {"hidden_states": draw(2, 16, 2, 4, 4), "encoder_hidden_states": draw(2, 6, TEXT_WIDTH)}
    inputs |= {"timestep": torch.tensor([700.0, 30.0])}
    found, expected = (pipe.transformer(**inputs).sample for pipe in (ours, stock))
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


def test_a_video_on_a_small_device_is_that_of_the_pipeline(folder):
    sampler = Sampler(str(folder), torch.device("cpu"), Placement("host", stream_weights=True))
    video = sampler.sample("rain", 3, SAMPLING)
    noise = torch.Generator().manual_seed(3)
    frames = load_pipeline(folder)("rain", generator=noise, output_type="pt", **SAMPLING.call_arguments()).frames[0]
    assert (video.int() - to_uint8(frames).int()).abs().max() <= 1
