"""An adapter by ComfyUI's convention has the same effect in ComfyUI's reader and in diffusers'."""

import pytest
import torch
import yaml
from diffusers import SD3Transformer2DModel
from diffusers.loaders import SD3LoraLoaderMixin
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, redness

from rlhf.adapter.lora import ATTENTION
from rlhf.adapter.lora_weights import ADAPTER_FILE
from rlhf.export import main
from rlhf.trainer import RewardGradientTrainer

LAYERS = [*ATTENTION, "ff.net.0.proj", "ff_context.net.2", "norm1.linear", "proj_out"]
CONFIGS = {
    "alpha": LoraConfig(r=4, lora_alpha=10, target_modules=LAYERS),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=LAYERS,
        rank_pattern={"to_q": 2, r"ff\..*": 6},
        alpha_pattern={"to_q": 7, "transformer_blocks.1.attn.to_k": 1},
    ),
    "rank stabilised": LoraConfig(r=4, lora_alpha=3, target_modules=ATTENTION, use_rslora=True),
}
# Layers that ComfyUI maps from diffusers' names, in a block and outside (its comfy/utils.py).
IN_A_BLOCK = {*(f"attn.{name}" for name in ATTENTION), "norm1.linear", "norm1_context.linear"}
IN_A_BLOCK |= {f"{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")}
OUTSIDE = {"context_embedder", "pos_embed.proj", "norm_out.linear", "proj_out"}
OUTSIDE |= {f"time_text_embed.{part}_embedder.linear_{i}" for part in ("timestep", "text") for i in (1, 2)}


def trained(make_args, folder, config):
    """A run of two steps with the adapter; what each of its layers adds to its weight."""
    args = make_args(output_dir=str(folder), max_steps=2, device="cpu")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder.parent / "base")
    RewardGradientTrainer(pipe, redness, args, PROMPTS, peft_config=config).train()
    settings = yaml.safe_load((folder / "config.yaml").read_text()) | {"model": str(folder.parent / "base")}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return deltas(pipe.transformer)


def deltas(transformer, adapter="default"):
    layers = {name: module for name, module in transformer.named_modules() if hasattr(module, "get_delta_weight")}
    return {name: module.get_delta_weight(adapter) for name, module in layers.items()}


def as_comfyui_reads(file) -> dict[str, torch.Tensor]:
    """By layer: up times down, times alpha / rank if given (comfy/weight_adapter/lora.py)."""
    tensors = load_file(file)
    names = {key.partition(".lora_")[0] for key in tensors}
    found = {}
    for name in names:
        up, down = tensors[f"{name}.lora_B.weight"], tensors[f"{name}.lora_A.weight"]
        alpha = tensors.get(f"{name}.alpha")
        found[name] = up @ down * (1.0 if alpha is None else alpha.item() / down.shape[0])
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_comfyui_reads_what_was_trained(make_args, tmp_path, kind):
    expected = trained(make_args, tmp_path / "run", CONFIGS[kind])
    assert max(delta.abs().max() for delta in expected.values()) > 1e-4
    main([str(tmp_path / "run"), "--adapter", str(tmp_path / "out"), "--convention", "comfyui"])
    file = tmp_path / "out" / ADAPTER_FILE
    found = as_comfyui_reads(file)
    assert found.keys() == {f"transformer.{name}" for name in expected}
    for name, delta in expected.items():
        torch.testing.assert_close(found[f"transformer.{name}"], delta, rtol=1e-5, atol=1e-8)
        block = name.split(".", 2)
        assert block[2] in IN_A_BLOCK if block[0] == "transformer_blocks" else name in OUTSIDE
    plain = as_comfyui_reads(tmp_path / "run" / "adapter" / ADAPTER_FILE)
    assert any(not torch.allclose(plain[f"transformer.{name}"], delta) for name, delta in expected.items())


@pytest.mark.parametrize(
    ("convention", "kind"), [("diffusers", "patterns"), ("comfyui", "patterns"), ("comfyui", "rank stabilised")]
)
def test_diffusers_own_loader_and_class_read_either(make_args, tmp_path, convention, kind):
    """Its Stable Diffusion 3 transformer, which differs from ours outside of the adapter."""
    expected = trained(make_args, tmp_path / "run", CONFIGS[kind])
    main([str(tmp_path / "run"), "--adapter", str(tmp_path / "out"), "--convention", convention])
    tensors, metadata = SD3LoraLoaderMixin.lora_state_dict(tmp_path / "out", return_lora_metadata=True)
    sizes = {name: size for name, size in tiny_pipeline().transformer.config.items() if not name.startswith("_")}
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    theirs = SD3Transformer2DModel(sample_size=8, pos_embed_max_size=8, caption_projection_dim=width, **sizes)
    SD3LoraLoaderMixin.load_lora_into_transformer(tensors, theirs, adapter_name="tuned", metadata=metadata)
    found = deltas(theirs, "tuned")
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-8)


def test_magnitudes_are_not_dropped_silently(make_args, tmp_path):
    trained(make_args, tmp_path / "run", LoraConfig(r=2, target_modules=["to_q"], use_dora=True))
    with pytest.raises(SystemExit, match="convention: got comfyui for an adapter with magnitudes.*use --merged"):
        main([str(tmp_path / "run"), "--adapter", str(tmp_path / "out"), "--convention", "comfyui"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="scale: got 0.5 for an adapter with magnitudes.*use --merged"):
        main([str(tmp_path / "run"), "--adapter", str(tmp_path / "out"), "--scale", "0.5"])
