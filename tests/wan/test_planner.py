"""What the planner says of Wan: sizes, and the memory of a call beside what autograd holds."""

import pytest
import torch
from kept import KeptBytes
from plans import CHECKPOINTED
from tiny_wan import tiny_wan_conditioning, tiny_wan_pipeline, tiny_wan_transformer

from rlhf.adapter.lora import add_adapter, lora_config
from rlhf.config import RewardGradientConfig, with_sampling
from rlhf.execution.apply import ExecutionOptions, set_up_blocks
from rlhf.generator.files import model_sizes
from rlhf.planner.traced import TracedModel
from rlhf.training.setup import latent_shape
from rlhf.wan.facts import WAN_1_3B, WAN_14B


@pytest.mark.parametrize("settings", [{}, CHECKPOINTED, CHECKPOINTED | {"keep_attention": True}])
def test_a_transformer_call_keeps_what_autograd_holds(settings):
    pipe = tiny_wan_pipeline()
    pipe.register_modules(transformer=tiny_wan_transformer(num_layers=6))
    common = {"lora_rank": 4, "num_frames": 33, "num_grad_steps": 2, "attention_kernel": "flash"}
    card = model_sizes("", pipe)
    args = with_sampling(RewardGradientConfig(**common | settings), card["sampling"])
    model, call = pipe.transformer, TracedModel(args, card).transformer_call(args, 2)
    add_adapter(model, lora_config(args), 0)
    latents = torch.randn(2, *latent_shape(pipe, args)).requires_grad_()
    cond = tiny_wan_conditioning(2, args.max_sequence_length)
    set_up_blocks(model, ExecutionOptions.from_settings(args), torch.device("cpu"))
    with KeptBytes(model) as kept:
        (v,) = model(latents, cond.prompt_embeds_BLD, cond.pooled_embeds_BP, torch.ones(2), return_dict=False)
        held = kept.now
        v.sum().backward()
    # The convolution of the patches saves the latents themselves, which the trace does not count.
    assert call.saved_bytes == pytest.approx(held - latents.nbytes + v.nbytes, rel=0.1)
    assert call.backward.peak_bytes > call.saved_bytes
    assert call.backward.peak_bytes >= 0.9 * kept.most


@pytest.mark.parametrize(("model", "parameters"), [(WAN_1_3B, 1_418_996_800), (WAN_14B, 14_288_491_584)])
def test_the_published_sizes_need_no_files_and_no_network(model, parameters, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    args = with_sampling(RewardGradientConfig(model=model), model_sizes(model)["sampling"])
    traced = TracedModel(args, model_sizes(model))
    assert traced.frozen.blocks + traced.frozen.rest == parameters
    assert (traced.num_tokens, traced.itemsize) == (32_760, 2)
