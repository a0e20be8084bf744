"""LoRA files of Wan: in diffusers' names and in the authors', for Wan and refused for ContentV."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_transformer
from tiny_wan import tiny_wan_transformer

from rlhf.adapter.lora_file import PEFT_FILE, read_lora
from rlhf.adapter.lora_weights import ADAPTER_FILE, Lora, LoraLayer
from rlhf.export import main
from rlhf.generator.loading import linear_sizes
from rlhf.io import write_json
from rlhf.wan.facts import FAMILY

WAN = dict(tiny_wan_transformer().config) | {"_class_name": "WanTransformer3DModel"}
NAMES = {  # of layers, and as the authors' code has them
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn1.to_out.0": "blocks.1.self_attn.o",
    "blocks.0.attn2.to_k": "blocks.0.cross_attn.k",
    "blocks.0.attn2.to_v": "blocks.0.cross_attn.v",
    "blocks.1.ffn.net.0.proj": "blocks.1.ffn.0",
    "blocks.1.ffn.net.2": "blocks.1.ffn.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.time_proj": "time_projection.1",
}


def wan_lora(rank=2) -> Lora:
    sizes, generator = linear_sizes(WAN), torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    return Lora({n: LoraLayer(draw(rank, sizes[n][1]), draw(sizes[n][0], rank), 3.0 * rank) for n in NAMES})


def tensors(name, up, down):
    return {
        name(theirs) + end: tensor
        for ours, theirs in NAMES.items()
        for end, tensor in (
            (up, wan_lora().layers[ours].b),
            (down, wan_lora().layers[ours].a),
            (".alpha", torch.tensor(6.0)),
        )
    }


FILES = {
    "ComfyUI": tensors(lambda n: f"diffusion_model.{n}", ".lora_B.weight", ".lora_A.weight"),
    "authors": tensors(lambda n: n, ".lora_up.weight", ".lora_down.weight"),
    "musubi": tensors(lambda n: "lora_unet_" + n.replace(".", "_"), ".lora_up.weight", ".lora_down.weight"),
    "VideoX-Fun": tensors(lambda n: "lora_unet__" + n.replace(".", "_"), ".lora_up.weight", ".lora_down.weight"),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_authors_names_are_read_for_wan_and_refused_for_contentv(tmp_path, kind):
    path = tmp_path / "lora.safetensors"
    save_file(FILES[kind], path)
    found, expected = read_lora(path, linear_sizes(WAN)).layers, wan_lora().layers
    assert found.keys() == expected.keys()
    for name, layer in expected.items():
        weight = torch.zeros(len(layer.b), layer.a.shape[1])
        torch.testing.assert_close(found[name].merge(weight), layer.merge(weight))
    contentv = linear_sizes(dict(tiny_transformer().config))
    with pytest.raises(ValueError, match="got LoRA of Wan"):
        read_lora(path, contentv)


def test_what_is_written_for_comfyui_is_read_again(tmp_path):
    lora, path = wan_lora(), tmp_path / "lora.safetensors"
    lora.scaled(0.5, fold=True).save_original(path, FAMILY.original_name)
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in load_file(path)
    found = read_lora(path, linear_sizes(WAN)).layers
    for name, layer in lora.layers.items():
        weight = torch.zeros(len(layer.b), layer.a.shape[1])
        torch.testing.assert_close(found[name].merge(weight), layer.merge(weight, 0.5))


def test_contentvs_files_are_refused_for_wan(tmp_path):
    path = tmp_path / "lora.safetensors"
    layer = {"a": torch.ones(2, 24), "b": torch.ones(24, 2)}
    name = "transformer.transformer_blocks.0.attn.to_q.lora_"
    save_file({f"{name}A.weight": layer["a"], f"{name}B.weight": layer["b"]}, path)
    with pytest.raises(ValueError, match="layers that this transformer does not have"):
        read_lora(path, linear_sizes(WAN))


OUTER = "condition_embedder.time_proj", "proj_out"


@pytest.fixture
def outer_run(tmp_path):
    """A run of a tiny Wan whose LoRA has no layer in a block, which ContentV could have by its name."""
    run, sizes = tmp_path / "run", linear_sizes(WAN)
    Lora({n: LoraLayer(torch.ones(2, sizes[n][1]), torch.ones(sizes[n][0], 2), 6.0) for n in OUTER}).save(
        run / "adapter" / ADAPTER_FILE
    )
    write_json(tmp_path / "wan" / "transformer" / "config.json", WAN)
    for name, file in FAMILY.config_files.items():
        write_json(tmp_path / "wan" / name / file, WAN if name == "transformer" else {"model_max_length": 8})
    write_json(tmp_path / "wan" / "model_index.json", {})
    return run


def export_of(run, out, model, *more) -> set[str]:
    (run / "config.yaml").write_text(f"model: {model}\n")
    main([str(run), "--adapter", str(out), "--convention", "comfyui", *map(str, more)])
    return {key.partition(".lora_")[0] for key in load_file(out / ADAPTER_FILE)}


def test_the_base_model_decides_the_names_of_layers_outside_of_blocks(outer_run, tmp_path):
    theirs = {"diffusion_model.time_projection.1", "diffusion_model.head.head"}
    assert export_of(outer_run, tmp_path / "a", tmp_path / "wan") == theirs
    assert export_of(outer_run, tmp_path / "b", "gone/away", "--model", tmp_path / "wan") == theirs
    for model, told in (("./gone", "got no base model .*such as condition_emb"), ("nano", "got layers of another mo")):
        with pytest.raises(SystemExit, match=f"{told}.*by --model"):
            export_of(outer_run, tmp_path / "c", model)
    assert not (tmp_path / "c").exists()


def test_layers_of_another_kind_of_model_are_refused(outer_run, tmp_path):
    wan_lora().save(outer_run / "adapter" / ADAPTER_FILE)
    assert "diffusion_model.blocks.0.self_attn.q" in export_of(outer_run, tmp_path / "a", "./gone")
    with pytest.raises(SystemExit, match="got layers of Wan, .*, expected those of model='nano', a ContentV; n"):
        export_of(outer_run, tmp_path / "b", "nano")


def test_patterns_of_a_training_in_the_authors_code_are_of_its_names(tmp_path):
    """DiffSynth-Studio's peft sees self_attn.q where diffusers has attn1.to_q."""
    named = tensors(lambda n: f"base_model.model.{n}", ".lora_B.weight", ".lora_A.weight")
    save_file({key: tensor for key, tensor in named.items() if "alpha" not in key}, tmp_path / PEFT_FILE)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"self_attn.q": 8, "^blocks.1.ffn.2": 1}}
    write_json(tmp_path / "adapter_config.json", config)
    alphas = {name: layer.alpha for name, layer in read_lora(tmp_path, linear_sizes(WAN)).layers.items()}
    assert alphas == dict.fromkeys(NAMES, 2.0) | {"blocks.0.attn1.to_q": 8.0, "blocks.1.ffn.net.2": 1.0}


@pytest.mark.parametrize(
    ("layer", "part", "told"),
    [
        ("blocks.0.cross_attn.k_img", "lora_A.weight", "layers that this transformer does not have, 1 of them"),
        ("blocks.0.self_attn.q", "magnitude", "blocks.0.self_attn.q.magnitude, which belongs to no LoRA"),
    ],
)
def test_a_lora_of_wan_that_does_not_fit_is_not_told_from_wan(tmp_path, layer, part, told):
    more = {f"diffusion_model.{layer}.{part}": torch.ones(2, 24)}
    save_file(FILES["ComfyUI"] | more, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"got (diffusion_model.)?{told}"):
        read_lora(tmp_path, linear_sizes(WAN))
