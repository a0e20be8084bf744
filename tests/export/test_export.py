"""A merged export computes what the adapter does; merging leaves no trace; adapters load."""

import dataclasses
import errno
import hashlib
import json
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from adapted_model import adapt, save_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import SAMPLING, tiny_conditioning, tiny_pipeline

from rlhf.adapter.lora_file import read_lora_for
from rlhf.adapter.lora_weights import ADAPTER_FILE
from rlhf.export import main
from rlhf.generator.loading import load_pipeline


def make_run(folder: Path) -> Path:
    """What a training run leaves behind, and its base model beside it."""
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "base")
    save_adapter(adapt(pipe), folder / "run" / "adapter")
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"model": str(folder / "base"), "seed": 0}))
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("export"))


def rewrite(path: Path, change) -> None:
    """Apply `change` to each key and value of an adapter file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(dict(change(key, value) for key, value in load_file(path).items()), path, metadata)


def velocity(pipe, **kwargs):
    cond = tiny_conditioning()
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return pipe.transformer(
            latents, cond.prompt_embeds_BLD, cond.pooled_embeds_BP, torch.tensor([500.0]), **kwargs
        ).sample


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_merged_output_equals_adapter_on(run, tmp_path, scale):
    before = fingerprint(run.parent / "base")
    main([str(run), "--merged", str(tmp_path / "out"), "--scale", str(scale)])
    assert fingerprint(run.parent / "base") == before

    base, exported = load_pipeline(run.parent / "base"), load_pipeline(tmp_path / "out")
    off, on = velocity(base), velocity(adapt(base), joint_attention_kwargs={"scale": scale})
    torch.testing.assert_close(velocity(exported), on, atol=1e-5, rtol=1e-5)
    assert (on - off).abs().max() > 0.02
    assert exported.transformer.state_dict().keys() == tiny_pipeline().transformer.state_dict().keys()


def test_merged_checkpoint_samples_what_the_adapter_samples(run, tmp_path):
    main([str(run), "--merged", str(tmp_path / "out")])
    with_adapter, exported = load_pipeline(run.parent / "base"), load_pipeline(tmp_path / "out")
    with_adapter.load_lora_weights(run / "adapter")
    assert exported.sampling == SAMPLING
    videos = [
        pipe("a red circle", generator=torch.Generator().manual_seed(0), **SAMPLING.call_arguments()).frames
        for pipe in (with_adapter, exported)
    ]
    torch.testing.assert_close(*map(torch.tensor, videos), atol=1e-4, rtol=0)


def test_merged_checkpoint_keeps_every_other_file_and_a_readable_index(run, tmp_path):
    main([str(run), "--merged", str(tmp_path / "out")])
    before, after = fingerprint(run.parent / "base"), fingerprint(tmp_path / "out")
    assert {*before, "README.md"} == after.keys()
    changed = {name for name in before if before[name] != after[name] and not name.endswith(".json")}
    assert changed == {"transformer/diffusion_pytorch_model.safetensors"}
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]


def test_an_adapter_that_was_taught_guidance_is_exported_to_be_sampled_without(tmp_path):
    run = make_run(tmp_path)
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"guidance_gradient": "distill"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    main([str(run), "--merged", str(tmp_path / "merged")])
    main([str(run), "--adapter", str(tmp_path / "adapter")])
    assert SAMPLING.guidance_scale > 1
    assert load_pipeline(tmp_path / "merged").sampling == dataclasses.replace(SAMPLING, guidance_scale=1.0)
    assert '.call_arguments() | {"guidance_scale": 1.0})' in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["merged", "adapter"])
@pytest.mark.parametrize("there", [False, True], ids=["new folder", "empty folder"])
def test_an_export_that_breaks_off_leaves_nothing_in_the_way_of_the_next(run, kind, there, tmp_path, monkeypatch):
    out = tmp_path / "out"
    if there:
        out.mkdir()
    full = Mock(side_effect=[OSError(errno.ENOSPC, "No space left on device"), None])
    monkeypatch.setattr("rlhf.export.write_card", full)
    with pytest.raises(SystemExit, match="got OSError: .* No space left"):
        main([str(run), f"--{kind}", str(out)])
    assert ([*out.iterdir()] == []) if there else not out.exists()
    main([str(run), f"--{kind}", str(out)])
    assert any(out.iterdir())


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_exported_adapter_is_read_by_load_lora_weights(run, tmp_path, scale):
    main([str(run), "--adapter", str(tmp_path / "out"), "--scale", str(scale)])
    pipe = load_pipeline(run.parent / "base")
    expected = velocity(adapt(load_pipeline(run.parent / "base")), joint_attention_kwargs={"scale": scale})
    pipe.load_lora_weights(tmp_path / "out")
    torch.testing.assert_close(velocity(pipe), expected, atol=1e-5, rtol=1e-5)
    assert all(key.startswith("transformer.") for key in load_file(tmp_path / "out" / ADAPTER_FILE))


@pytest.mark.parametrize("kind", ["--merged", "--adapter"])
def test_what_the_card_says_of_its_use_works(run, tmp_path, monkeypatch, kind):
    main([str(run), kind, str(tmp_path / "out")])
    (block,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(run.parent)  # where "base" is
    names = {}
    exec(block.replace("path/to/this/folder", str(tmp_path / "out")), names)
    assert names["frames"].shape[-1] == 3


@pytest.mark.parametrize("kind", ["--merged", "--adapter"])
def test_an_output_folder_in_use_is_refused(run, tmp_path, kind):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="exists and is not empty, expected a new folder; choose another"):
        main([str(run), kind, str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"config.yaml: got no file there, expected the folder of a training run"):
        main([str(tmp_path / "nowhere"), "--merged", str(tmp_path / "out")])


def test_a_moved_base_model_can_be_named(tmp_path):
    run = make_run(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(SystemExit, match="base.*is no folder here"):
        main([str(run), "--merged", str(tmp_path / "out")])
    main([str(run), "--merged", str(tmp_path / "out"), "--model", str(tmp_path / "moved")])
    assert (tmp_path / "out" / "model_index.json").is_file()


def spoil(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    return key, value.fill_(torch.nan) if "lora_B" in key else value


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "weights.safetensors: got a damaged file"),
        (lambda path: (path.parents[1] / "config.yaml").write_text(""), "config.yaml: got a damaged file"),
        (lambda path: rewrite(path, spoil), "NaN"),
    ],
)
@pytest.mark.parametrize("kind", ["--merged", "--adapter"])
def test_a_damaged_run_and_an_adapter_that_is_not_finite_are_told(tmp_path, kind, change, told):
    run = make_run(tmp_path)
    change(run / "adapter" / ADAPTER_FILE)
    with pytest.raises(SystemExit, match=told):
        main([str(run), kind, str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda key, value: (f"other.{key}", value),
            "got layers that this transformer does not have, 15 of them",
        ),
        (lambda key, value: (key, torch.zeros(3, 7)), "\\(r, in\\) and \\(out, r\\) of one rank"),
    ],
)
def test_an_adapter_of_another_model_is_not_merged_as_nothing(tmp_path, change, told):
    rewrite(make_run(tmp_path) / "adapter" / ADAPTER_FILE, change)
    with pytest.raises(SystemExit, match=f"weights.safetensors: .*{told}"):
        main([str(tmp_path / "run"), "--merged", str(tmp_path / "out")])


@pytest.mark.parametrize("kind", ["--merged", "--adapter"])
def test_a_scale_that_is_no_number_and_a_place_that_cannot_be_written_are_told(run, tmp_path, kind):
    for scale in ("nan", "inf", "1e+40"):
        with pytest.raises(SystemExit, match=re.escape(f"scale: got {scale}, expected a finite number")):
            main([str(run), kind, str(tmp_path / "out"), "--scale", scale])
    (tmp_path / "file").write_text("mine")
    told = "got NotADirectoryError.*expected to read .* and to write .*file/out; check paths"
    with pytest.raises(SystemExit, match=told):
        main([str(run), kind, str(tmp_path / "file" / "out")])


@pytest.mark.parametrize("form", ["run", "exported", "comfyui"])
def test_an_adapter_is_not_added_to_weights_that_hold_it(run, tmp_path, form):
    main([str(run), "--merged", str(tmp_path / "merged"), "--scale", "0.5"])
    adapter = run / "adapter" if form == "run" else tmp_path / "adapter"
    if form != "run":
        convention = form if form == "comfyui" else "diffusers"
        main([str(run), "--adapter", str(adapter), "--convention", convention])
    config = load_pipeline(tmp_path / "merged").transformer.config
    with pytest.raises(ValueError, match="got a LoRA that is merged into the model's weights already"):
        read_lora_for(dict(config), adapter)
    assert read_lora_for(dict(load_pipeline(run.parent / "base").transformer.config), adapter).layers
