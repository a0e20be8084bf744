"""A run from a LoRA: base and LoRA are its base; what it saves holds both; it resumes and exports."""

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import SAMPLING, tiny_pipeline
from toy_rewards import PROMPTS, redness, rows_without_cost

import rlhf.training.setup
from rlhf.adapter.lora_file import read_lora
from rlhf.adapter.lora_weights import ADAPTER_FILE, Lora, LoraLayer
from rlhf.adapter.merge import apply_lora
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.export import main
from rlhf.generator.loading import linear_sizes
from rlhf.method.rollout import draw_noise
from rlhf.trainer import RewardGradientTrainer


def style(distilled=False, dora=False) -> Lora:
    """A strong LoRA of some attention layers of the tiny model."""
    draw = torch.Generator().manual_seed(3)
    sizes = {n: size for n, size in linear_sizes(tiny_pipeline().transformer.config).items() if n.endswith("to_q")}
    layers = {
        name: LoraLayer(torch.randn(3, cols, generator=draw), torch.randn(rows, 3, generator=draw) / 10, 6.0)
        for name, (rows, cols) in sizes.items()
    }
    if dora:
        layers = {name: replace(layer, magnitude=torch.ones(len(layer.b))) for name, layer in layers.items()}
    return Lora(layers, distilled)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("initial")
    tiny_pipeline().save_pretrained(folder / "base")
    style().save(folder / "style.safetensors")
    return folder


@pytest.fixture(scope="module")
def ran(base):
    """A run of three steps from the LoRA, its trained LoRA apart, and the lines that it printed."""
    made = trainer(base, base / "run")
    made.train()
    with made.masters.use(made.masters.average):
        return base / "run", made.masters.trained_lora(), rows_without_cost(made.args)


@pytest.fixture
def run(ran, tmp_path):
    """A copy of that run which a test may change."""
    return shutil.copytree(ran[0], tmp_path / "run")


def trainer(base, folder, pipe=None, **changes) -> RewardGradientTrainer:
    sizes = {"num_frames": 5, "height": 16, "width": 32, "num_inference_steps": 3, "lora_rank": 4, "lora_alpha": 2}
    steps = {"max_steps": 3, "save_steps": 1, "save_total_limit": 0, "learning_rate": 1e-2, "ema_decay": 0.5}
    run = {"output_dir": str(folder), "eval_prompts": "none", "report_to": "none", "device": "cpu", "cpu_threads": 1}
    settings = sizes | steps | run | {"drift_weight": 0.1, "initial_adapter": str(base / "style.safetensors")} | changes
    args = RewardGradientConfig(model=str(base / "base"), **settings)
    return RewardGradientTrainer(pipe or tiny_pipeline(), redness, args, PROMPTS)


def weights(*loras: Lora) -> dict[str, torch.Tensor]:
    """The tiny model's weights with LoRAs, one after the other, in float64."""
    transformer = tiny_pipeline().transformer.double()
    for lora in loras:
        apply_lora(transformer, lora, merge=True)
    return transformer.state_dict()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].double(), weight, rtol=1e-6, atol=1e-6)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / ADAPTER_FILE).read_bytes()


def test_base_and_lora_are_the_base_and_the_result_holds_both(base, ran, tmp_path, capsys):
    folder, trained, rows = ran
    assert rows[0]["drift"] == 0 < rows[1]["drift"], "measured from base and LoRA"
    assert {len(read_lora(folder).layers[name].a) for name in style().layers} == {3 + 4}
    assert_close(weights(read_lora(folder)), weights(style(), trained))
    first, merged = trainer(base, tmp_path / "a"), tiny_pipeline()
    assert re.search(r"style.safetensors: LoRA: 2 of \d+ linear layers changed, by", capsys.readouterr().out)
    apply_lora(merged.transformer, style(), merge=True)
    other = trainer(base, tmp_path / "b", merged, initial_adapter=None)
    noise = draw_noise(first.batches.noise_shape, 0, "evaluation", [(0, 0)])
    videos = [made.sample_base(PROMPTS[:1], noise).video_BCTHW for made in (first, other)]
    assert torch.equal(*videos), "what gains and calibration are measured from"


@pytest.mark.parametrize("where", ["run", "elsewhere"])
def test_it_resumes_to_the_bit_without_the_file_that_it_began_with(base, run, tmp_path, where):
    moved = base / "style.safetensors"
    shutil.rmtree(run / "adapter")
    if where == "run":
        shutil.rmtree(run / "checkpoints" / "step-3")
    resumed = {"resume_from_checkpoint": str(run / "checkpoints" / "step-2")}
    with pytest.raises(ConfigError, match="initial_adapter: got None, expected .* as in"):
        trainer(base, tmp_path / where, initial_adapter=None, **resumed)
    moved.rename(base / "gone")
    try:
        trainer(base, tmp_path / where, **resumed).train()
    finally:
        (base / "gone").rename(moved)
    assert adapter_bytes(tmp_path / where / "adapter") == adapter_bytes(base / "run" / "adapter")
    assert adapter_bytes(tmp_path / where / "initial_adapter") == moved.read_bytes()


def test_run_checkpoint_and_interrupted_run_are_exported_with_both(ran, run, tmp_path, capsys):
    main([str(run), "--adapter", str(tmp_path / "a")])
    main([str(run / "checkpoints" / "step-3"), "--adapter", str(tmp_path / "b")])
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b") == adapter_bytes(run / "adapter")
    shutil.rmtree(run / "adapter")  # as of a run that was interrupted
    shutil.rmtree(run / "checkpoints" / "step-3")
    capsys.readouterr()
    main([str(run), "--merged", str(tmp_path / "m")])
    assert "exporting " in (said := capsys.readouterr().out)
    assert "checkpoints/step-2, step 2 of 3" in said
    assert_close(read_weights(tmp_path / "m"), weights(read_lora(run / "checkpoints" / "step-2")))
    card = (tmp_path / "m" / "README.md").read_text()
    assert "began with the LoRA adapter style.safetensors" in card
    assert "weights of a checkpoint at step 2 of the run. They were not evaluated" in card
    files = [path for path in (tmp_path / "m").rglob("*.json") if "tokenizer.json" not in path.name]
    assert not any("name_or_path" in path.read_text() for path in files)
    assert "initial" not in card
    (run / "checkpoints" / "step-1" / "average.safetensors").write_bytes(b"short")
    with pytest.raises(SystemExit, match="step-1: average.safetensors is damaged"):
        main([str(run / "checkpoints" / "step-1"), "--merged", str(tmp_path / "n")])
    shutil.rmtree(run / "initial_adapter")
    with pytest.raises(SystemExit, match="got a checkpoint without its run, expected initial_adapter/"):
        main([str(run), "--merged", str(tmp_path / "n")])


def read_weights(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "transformer" / "diffusion_pytorch_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def test_an_adapter_that_was_taught_guidance_keeps_being_sampled_without(base, tmp_path):
    style(distilled=True).save(tmp_path / "distilled" / ADAPTER_FILE)
    for guidance, told in ((None, True), (2.0, False)):
        made = trainer(
            base,
            tmp_path / "run",
            initial_adapter=str(tmp_path / "distilled"),
            guidance_scale=guidance,
        )
        assert made.args.guidance_scale == (guidance or 1.0)
        assert made.masters.trained_lora().distilled == told
    assert SAMPLING.guidance_scale > 1


def test_what_cannot_be_added_is_refused_before_anything_is_loaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.training.setup.find_base", None)
    style(dora=True).save(tmp_path / "dora.safetensors")
    for changes, told in (
        ({"initial_adapter": str(tmp_path / "dora.safetensors")}, "got a DoRA, .*, expected plain LoRA"),
        ({"initial_adapter": str(tmp_path)}, None),
    ):
        with pytest.raises(ConfigError, match=told or "got a DoRA"):
            trainer(base, tmp_path / "run", **changes)


def test_a_pipeline_gets_it_once_and_before_its_blocks_are_rounded_sharded_or_streamed(base, tmp_path, monkeypatch):
    pipe, seen, set_up = tiny_pipeline(), {}, rlhf.training.setup.set_up_blocks
    monkeypatch.setattr(
        "rlhf.training.setup.set_up_blocks",
        lambda model, *rest: (seen.update(copy.deepcopy(model.state_dict())), set_up(model, *rest))[1],
    )
    trainer(base, tmp_path / "a", pipe)
    assert_close({key.replace(".base_layer", ""): tensor for key, tensor in seen.items()}, weights(style()))
    pipe.unload_lora_weights()
    with pytest.raises(ConfigError, match="initial_adapter: got a pipeline into which a run has merged"):
        trainer(base, tmp_path / "b", pipe)
