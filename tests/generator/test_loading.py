"""A checkpoint loads from its folder, whatever its index says; missing files are named."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch
from diffusers import AutoencoderKLWan
from mapped import is_mapped
from safetensors.torch import load_file, save_file
from tiny import LETTERS, SAMPLING, tiny_pipeline
from transformers import CLIPTokenizer, T5TokenizerFast

from rlhf.contentv.transformer import SD3Transformer3DModel
from rlhf.generator import loading
from rlhf.generator.files import NANO_PATH, model_folder, model_sizes, resolve_model
from rlhf.generator.loading import load_pipeline
from rlhf.generator.registry import CONTENTV_8B

PROMPT = "a red circle"


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def edit_json(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def sample(pipe):
    arguments = pipe.sampling.call_arguments() | {"output_type": "latent"}
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **arguments).frames


def test_a_saved_pipeline_samples_as_before(saved):
    pipe = load_pipeline(saved)
    assert pipe.sampling == SAMPLING
    torch.testing.assert_close(sample(pipe), sample(tiny_pipeline()), atol=1e-5, rtol=1e-5)


def test_everything_is_frozen_and_in_evaluation_mode(saved):
    modules = [m for m in load_pipeline(saved).components.values() if isinstance(m, torch.nn.Module)]
    assert len(modules) == 5
    assert not any(part.training for module in modules for part in module.modules())
    assert not any(p.requires_grad for module in modules for p in module.parameters())


def test_weights_are_mapped_from_their_files(saved):
    modules = [m for m in load_pipeline(saved).components.values() if isinstance(m, torch.nn.Module)]
    assert all(is_mapped(p) for module in modules for p in module.parameters())


def test_a_pipeline_opens_without_weights_and_has_an_encoder_only_while_it_is_lent(saved):
    checkpoint = loading.Checkpoint.find(saved)
    pipe = checkpoint.open_pipeline()
    assert {p.device.type for m in (pipe.transformer, pipe.vae) for p in m.parameters()} == {"meta"}
    has = lambda: [name for name in pipe.family.text_encoders if getattr(pipe, name)]
    with checkpoint.lend_encoder(pipe, "text_encoder_2", torch.device("cpu")):
        assert has() == ["text_encoder_2"]
    assert has() == []
    checkpoint.load_generator(pipe)
    assert not {p.device.type for m in (pipe.transformer, pipe.vae) for p in m.parameters()} - {"cpu"}


@pytest.mark.parametrize("module", ["contentv_transformer", "diffusers", "nowhere"])
def test_the_index_is_not_asked_for_classes(checkpoint, module):
    edit_json(checkpoint / "model_index.json", transformer=[module, "SD3Transformer3DModel"], vae=["x", "Y"])
    assert load_pipeline(checkpoint).transformer.config.num_layers == 2


def test_half_precision_files_are_cast_up(checkpoint):
    path = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({key: value.half() for key, value in load_file(path).items()}, path)
    pipe = load_pipeline(checkpoint)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}


def test_dtype_is_of_transformer_and_text_and_not_of_the_vae(saved, monkeypatch):
    pipe = load_pipeline(saved, dtype=torch.bfloat16, device="cpu")
    assert {pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.text_encoder_3.dtype} == {torch.bfloat16}
    assert pipe.vae.dtype == torch.float32
    monkeypatch.setattr(loading, "BF16_ABOVE_BYTES", 1000)  # as if it were large
    assert load_pipeline(saved).transformer.dtype == torch.bfloat16


def test_tokenizers_load_from_the_files_of_older_checkpoints(checkpoint):
    """ContentV-8B has vocab.json and merges.txt for CLIP, a sentencepiece model for T5."""
    words = {w: i for i, w in enumerate(["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)])}
    for name in ("tokenizer", "tokenizer_2"):
        (checkpoint / name / "tokenizer.json").unlink()
        (checkpoint / name / "vocab.json").write_text(json.dumps(words | {"re": 100, "red</w>": 101}))
        (checkpoint / name / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    (checkpoint / "tokenizer_3" / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle", "two blue squares", "a red star"] * 20),
        model_prefix=str(checkpoint / "tokenizer_3" / "spiece"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pipe = load_pipeline(checkpoint)
    assert isinstance(pipe.tokenizer, CLIPTokenizer)
    assert isinstance(pipe.tokenizer_3, T5TokenizerFast)
    assert pipe.tokenizer("red").input_ids == [0, 101, 1]
    ids = pipe.tokenizer_3("a red circle").input_ids
    assert ids[-1] == 1
    assert 2 not in ids
    assert pipe.tokenizer_3.decode(ids, skip_special_tokens=True) == "a red circle"


@pytest.mark.parametrize("part", ["vae", "text_encoder_3", "tokenizer"])
def test_a_missing_part_is_named(checkpoint, part):
    shutil.rmtree(checkpoint / part)
    with pytest.raises(ValueError, match=rf"lacks {part}/\w+.json, expected a checkpoint in diffusers layout"):
        resolve_model(checkpoint)


@pytest.mark.parametrize(("part", "key"), [("transformer", "proj_out.bias"), ("vae", "decoder.conv_in.bias")])
@pytest.mark.parametrize("renamed", [False, True])
def test_weights_that_do_not_fit_are_refused(checkpoint, part, key, renamed):
    path = checkpoint / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    bias = weights.pop(key)
    save_file(weights | ({"stranger": bias} if renamed else {}), path)
    with pytest.raises(ValueError, match=rf"do not fit .*: {1 + renamed} keys are .*, the first is {key}"):
        load_pipeline(checkpoint)


def test_weights_are_never_unpickled(checkpoint):
    path = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    with pytest.raises(ValueError, match="got 1 weight files missing, the first transformer.*safetensors, expected"):
        load_pipeline(checkpoint)


def test_a_truncated_download_is_named(checkpoint):
    path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="vae holds no readable safetensors weights .* check that the download is"):
        load_pipeline(checkpoint)


@pytest.mark.parametrize("name", ["nanoo", "./runs/none", "/no/such/place", "a/b/c"])
def test_an_absent_model_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *_, **__: pytest.fail(f"asked {host}"))
    with pytest.raises(ValueError, match=rf"model='{name}' is no folder here, expected nano, .* or a hub id"):
        load_pipeline(name)


def test_a_hub_id_that_cannot_be_had_is_explained(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise ConnectionError("no route\nand a long trace")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert resolve_model("someone/Some-Model") == "someone/Some-Model"
    with pytest.raises(ValueError, match="got no folder here, nothing in the Hugging Face cache, and "):
        load_pipeline("someone/Some-Model")


def test_a_hub_id_is_downloaded_without_what_is_not_needed(monkeypatch, saved):
    asked = {}
    download = lambda name, **kwargs: asked.update(kwargs) or str(saved)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert model_folder("someone/Some-Model") == saved
    assert "transformer/*" in asked["allow_patterns"]
    assert len(asked["allow_patterns"]) == 11
    assert model_sizes("someone/Some-Model")["transformer"]["num_layers"] == 2
    configs = ["transformer/config.json", "vae/config.json", "tokenizer/tokenizer_config.json"]
    assert asked["allow_patterns"] == [*configs, "model_index.json", "sampling.json"]


def test_a_run_folder_is_told_from_a_checkpoint(tmp_path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(ValueError, match=r"this is a run directory: `python -m rlhf.export .* --merged OUT`"):
        resolve_model(tmp_path)


CONTENTV_SIZES = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "num_layers": 38,
    "num_attention_heads": 38,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}


def test_config_of_contentv_8b_needs_nothing(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    config = model_sizes(CONTENTV_8B)
    with torch.device("meta"):
        transformer = SD3Transformer3DModel.from_config(config["transformer"])
        vae = AutoencoderKLWan.from_config(config["vae"])
    assert {key: transformer.config[key] for key in CONTENTV_SIZES} == CONTENTV_SIZES
    assert vae.config["base_dim"] == 96
    assert vae.config["temperal_downsample"] == config["vae"]["temperal_downsample"]
    assert config["sampling"]["num_frames"] == 125


def test_config_of_a_folder_reads_no_weights(checkpoint):
    for file in checkpoint.rglob("*.safetensors"):
        file.unlink()
    edit_json(checkpoint / "transformer" / "config.json", qk_norm="rms_norm", sample_size=128)
    config = model_sizes(checkpoint)
    assert config["transformer"]["num_layers"] == 2
    assert config["transformer"]["joint_attention_dim"] == 32
    assert config["vae"]["base_dim"] == 4
    assert config["vae"]["z_dim"] == 16
    assert config["sampling"]["width"] == 48


@pytest.mark.skipif(not NANO_PATH.is_dir(), reason="the nano weights are not in this checkout")
def test_nano_is_the_default_and_small():
    assert resolve_model("nano") == NANO_PATH
    pipe = load_pipeline()
    assert pipe.transformer.dtype == torch.float32
    sizes = (pipe.sampling.height, pipe.sampling.width, pipe.sampling.num_frames)
    assert sizes == (64, 64, 17)
    assert sample(pipe).shape == (1, 16, 5, 8, 8)
