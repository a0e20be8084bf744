"""The whole trainer on a tiny Wan in the published layout: train, resume, export, load in diffusers."""

import dataclasses
import gc
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
from runs import adapter, assert_same_training
from tiny import SAMPLING, tiny_pipeline
from tiny_wan import CLOSE, euler, save_tiny_wan
from toy_rewards import PROMPTS, redness, rows_without_cost

from rlhf.adapter.lora_file import read_lora
from rlhf.adapter.merge import apply_lora
from rlhf.checks import check_config
from rlhf.config import ConfigError
from rlhf.export import main
from rlhf.generator.files import model_sizes
from rlhf.generator.loading import Checkpoint, linear_sizes, load_pipeline
from rlhf.io import read_object, write_json
from rlhf.trainer import RewardGradientTrainer


@pytest.fixture
def folder(tmp_path):
    return save_tiny_wan(tmp_path / "wan")


def train(args):
    return RewardGradientTrainer(None, redness, args, PROMPTS).train()


def sample(pipe, **kwargs):
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(3))
    return pipe(PROMPTS[0], latents=noise, output_type="pt", **SAMPLING.call_arguments(), **kwargs).frames


@pytest.mark.parametrize("save", [lambda folder: tiny_pipeline().save_pretrained(folder), save_tiny_wan])
def test_encoders_are_read_one_after_another_and_are_gone_before_the_transformer(
    save, make_args, tmp_path, monkeypatch
):
    events, alive = [], []

    def note(name):
        method = getattr(Checkpoint, name)

        def noted(self, *args):
            gc.collect()
            events.append((name, sum(ref() is not None for ref in alive)))
            found = method(self, *args)
            alive.extend([weakref.ref(found)] if name == "load_encoder" else [])
            return found

        monkeypatch.setattr(Checkpoint, name, noted)

    save(tmp_path / "model")
    note("load_encoder")
    note("load_generator")
    args = make_args(model=str(tmp_path / "model"), max_steps=1)
    trainer = RewardGradientTrainer(None, redness, args, PROMPTS)
    encoders = len(trainer.pipe.family.text_encoders)
    assert events == [("load_encoder", 0)] * encoders + [("load_generator", 0)]
    trainer.train()
    assert len(events) == encoders + 1, "every prompt was encoded by then"


def test_a_run_resumes_to_the_bit_and_diffusers_loads_what_it_exports(folder, make_args, tmp_path):
    settings = {"model": str(folder), "max_steps": 2, "save_steps": 1, "num_grad_steps": 2, "guidance_scale": 3.0}
    settings |= {"drift_weight": 0.1, "learning_rate": 1e-2, "gradient_checkpointing": True, "keep_attention": True}
    whole = make_args(**settings)
    train(whole)
    resumed = dataclasses.replace(whole, output_dir=str(tmp_path / "resumed"))
    train(dataclasses.replace(resumed, max_steps=1))
    train(dataclasses.replace(resumed, resume_from_checkpoint="latest"))
    assert torch.equal(adapter(whole), adapter(resumed))
    assert rows_without_cost(whole)[1] == rows_without_cost(resumed)[-1]

    run = Path(whole.output_dir)
    main([str(run), "--adapter", str(tmp_path / "adapter")])
    main([str(run), "--merged", str(tmp_path / "merged")])
    ours = load_pipeline(folder)
    base = sample(ours)
    lora = read_lora(run / "adapter", linear_sizes(model_sizes(folder)["transformer"]))
    apply_lora(ours.transformer, lora)
    tuned = sample(ours)
    assert (tuned - base).abs().max() > 1e-3
    stock = euler(diffusers.WanPipeline.from_pretrained(folder))
    torch.testing.assert_close(sample(stock), base, **CLOSE)
    stock.load_lora_weights(tmp_path / "adapter")
    torch.testing.assert_close(sample(stock), tuned, **CLOSE)
    main([str(run), "--adapter", str(tmp_path / "comfyui"), "--convention", "comfyui"])
    stock.unload_lora_weights()
    stock.load_lora_weights(tmp_path / "comfyui")  # diffusers translates the authors' names itself
    torch.testing.assert_close(sample(stock), tuned, **CLOSE)
    merged = euler(diffusers.WanPipeline.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(sample(merged), tuned, **CLOSE)
    assert (tmp_path / "merged" / "scheduler" / "scheduler_config.json").read_text() == (
        folder / "scheduler" / "scheduler_config.json"
    ).read_text()
    assert "WanPipeline.load_lora_weights" in (tmp_path / "adapter" / "README.md").read_text()


SPEED = [
    {"stepwise_backward": True, "gradient_checkpointing": True, "offload_activations": True},
    {"stream_weights": True, "gradient_checkpointing": True},
    {"guidance_together": True, "decode_chunk": 1, "decode_checkpoint": True},
]


def test_settings_of_speed_and_memory_train_the_same(folder, make_args, tmp_path):
    args = make_args(model=str(folder), max_steps=2, guidance_scale=3.0, learning_rate=1e-2, num_grad_steps=2)
    train(args)
    for i, speed in enumerate(SPEED):
        faster = dataclasses.replace(args, output_dir=str(tmp_path / f"{i}"), **speed)
        train(faster)
        assert_same_training(args, faster)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("transformer/config.json", "image_dim", 1280),
        ("transformer/config.json", "in_channels", 36),
        ("model_index.json", "boundary_ratio", 0.875),
        ("model_index.json", "expand_timesteps", True),
        ("vae/config.json", "is_residual", True),
    ],
)
def test_other_models_of_the_family_are_refused_before_weights(folder, make_args, file, key, value):
    write_json(folder / file, read_object(folder / file) | {key: value})
    with pytest.raises(ConfigError, match=f"{key}=.*no text-to-video model of Wan"):
        check_config(make_args(model=str(folder)))


def test_a_scheduler_of_another_flow_is_refused(folder):
    path = folder / "scheduler" / "scheduler_config.json"
    write_json(path, read_object(path) | {"prediction_type": "epsilon"})
    with pytest.raises(ValueError, match="expected one of a flow"):
        load_pipeline(folder)
