"""A tiny transformer with an adapter, its inputs and its gradients, for tests of how blocks run."""

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import tiny_conditioning, tiny_pipeline, tiny_transformer

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def model_with_adapter(dtype=torch.float64, **sizes):
    """Return a tiny transformer with a random LoRA adapter on all attention layers."""
    model = tiny_transformer(**sizes).to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False))
    return model


def adapt(pipe):
    """Add a strong random adapter to the pipeline's transformer, always the same one."""
    config = LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.transformer.add_adapter(config)
    return pipe


def save_adapter(pipe, folder):
    """Write the adapter of `adapt` as a training run does."""
    pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )


def save_tiny_model(folder):
    """Write a tiny pipeline to folder/base, and an adapter of it to folder/adapter; return the folder."""
    tiny_pipeline().save_pretrained(folder / "base")
    save_adapter(adapt(tiny_pipeline()), folder / "adapter")
    return folder


def arguments(dtype=torch.float64, batch=2, frames=2, height=4, width=6, channels=16):
    """Return latents, text, pooled text and timesteps for a tiny transformer."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, channels, frames, height, width, generator=generator).to(dtype)
    cond = tiny_conditioning(batch).to(dtype)
    return latents, cond.prompt_embeds_BLD, cond.pooled_embeds_BP, torch.tensor([900.0, 3.5])[:batch]


def velocity(model, inputs):
    """Return the model's velocity, without gradient."""
    with torch.no_grad():
        return model(*inputs).sample


def gradients(model, inputs):
    """Return the gradients of a smooth function of the velocity, by name of parameter or input."""
    inputs = [x.clone().requires_grad_(x.dtype == inputs[0].dtype) for x in inputs]
    model.zero_grad()
    velocity = model(*inputs).sample
    (velocity.square() * torch.linspace(-1, 1, velocity.numel()).view_as(velocity)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"input {i}": x.grad for i, x in enumerate(inputs[:3])}


def assert_equal(found, expected, **tolerance):
    """Compare two results of `gradients`, none of which may be zero."""
    assert found.keys() == expected.keys()
    assert len(found) > 20
    for name, grad in expected.items():
        assert grad.abs().max() > 0 or "add_q_proj" in name, name  # of the last block nothing reads the text's queries
        torch.testing.assert_close(found[name], grad, **tolerance)
