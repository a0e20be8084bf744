"""LoRA files of every tool add alpha / r B A to each weight, or are refused by the true cause."""

import copy
import functools
import json
import math
import re
from pathlib import Path
from statistics import median

import pytest
import torch
from adapted_model import TARGETS
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
)
from peft import LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_transformer

from rlhf.adapter.lora_file import PEFT_FILE, find_lora_file, read_lora
from rlhf.adapter.lora_weights import ADAPTER_FILE, Lora, LoraLayer
from rlhf.adapter.merge import apply_lora
from rlhf.contentv.facts import SIZES
from rlhf.evaluation.generate import Variant
from rlhf.export import export_adapter, export_merged
from rlhf.generator.loading import linear_sizes

Q, OUT, FF = (f"transformer_blocks.{name}" for name in ("0.attn.to_q", "1.attn.to_out.0", "1.ff.net.0.proj"))
RANKS, ALPHAS = {Q: 4, OUT: 2, FF: 4}, {Q: 4.0, OUT: 3.0, FF: 10.0}
ROUNDED = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)
ONES = {name: float(rank) for name, rank in RANKS.items()}


@functools.cache
def sizes():
    return linear_sizes(tiny_transformer().config)


@functools.cache
def factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    shapes = {name: sizes()[name] for name in RANKS}
    return {
        name: (torch.randn(RANKS[name], size, generator=draw), torch.randn(out, RANKS[name], generator=draw))
        for name, (out, size) in shapes.items()
    }


def keys(template="transformer.{name}.{half}.weight", a="lora_A", b="lora_B") -> dict[str, torch.Tensor]:
    """Tensors of all layers. The template has {name}, or {flat} with _ in place of dots, and {half}."""
    found = {}
    for name, pair in factors().items():
        for half, tensor in zip((a, b), pair, strict=True):
            found[template.format(name=name, flat=name.replace(".", "_"), half=half)] = tensor
    return found


def alphas(template: str) -> dict[str, torch.Tensor]:
    return {
        template.format(name=name, flat=name.replace(".", "_")): torch.tensor(value) for name, value in ALPHAS.items()
    }


def metadata(prefix="transformer.", **changes) -> dict[str, str]:
    config = {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_out.0": 2}, "alpha_pattern": {"to_out.0": 3, "proj": 10}}
    return {"lora_adapter_metadata": json.dumps({prefix + key: value for key, value in (config | changes).items()})}


FLAT = keys("lora_unet_{flat}.{half}.weight", "lora_down", "lora_up")
# name: tensors, metadata of the file, alphas that it means
FILES = {
    "diffusers": (keys(), metadata(), ALPHAS),
    "diffusers, rank stabilised": (
        keys(),
        metadata(use_rslora=True),
        {name: alpha * RANKS[name] ** 0.5 for name, alpha in ALPHAS.items()},
    ),
    "diffusers, no metadata": (keys(), {"format": "pt"}, ONES),
    "an adapter's name": (keys("transformer.{name}.{half}.default.weight"), metadata(), ALPHAS),
    "no prefix": (keys("{name}.{half}.style.weight"), {}, ONES),
    "older diffusers": (convert_state_dict_to_diffusers(keys(), StateDictType.PEFT), {}, ONES),
    "lora.down and .up": (keys(a="lora.down", b="lora.up"), {}, ONES),
    "attention processors": (
        {
            key.replace("attn.to_q.", "attn.processor.to_q_").replace("attn.to_out.0.", "attn.processor.to_out_"): value
            for key, value in keys(a="lora.down", b="lora.up").items()
        },
        {},
        ONES,
    ),
    "kohya": (FLAT | alphas("lora_unet_{flat}.alpha"), {"ss_network_dim": "4", "ss_network_alpha": "1"}, ALPHAS),
    "kohya, alpha in the metadata alone": (
        {key: tensor for key, tensor in FLAT.items() if "out" not in key},
        {"ss_network_dim": "4", "ss_network_alpha": "6.0"},
        {Q: 6.0, FF: 6.0},
    ),
    "kohya, no alpha stated": (FLAT, {"ss_network_dim": "4", "ss_network_alpha": "None"}, ONES),
    "musubi-tuner's converter": (  # it has multiplied the scale into the weights
        keys("diffusion_model.{name}.{half}.weight"),
        {"ss_network_dim": "8", "ss_network_alpha": "1"},
        ONES,
    ),
    "kohya, by diffusers": (
        convert_state_dict_to_kohya({f"unet.{key.removeprefix('transformer.')}": t for key, t in keys().items()}),
        {},
        ONES,
    ),
    "LyCORIS' LoRA": (
        keys("lycoris_{flat}.{half}.weight", "lora_down", "lora_up") | alphas("lycoris_{flat}.alpha"),
        {},
        ALPHAS,
    ),
    "ComfyUI": (
        keys("diffusion_model.{name}.{half}.weight", "lora_down", "lora_up") | alphas("diffusion_model.{name}.alpha"),
        {},
        ALPHAS,
    ),
    "ComfyUI, A and B": (keys("diffusion_model.{name}.{half}.weight"), {}, ONES),
    **{str(dtype): ({key: t.to(dtype) for key, t in keys().items()}, metadata(), ALPHAS) for dtype in ROUNDED},
}

SAYS_OTHERWISE = (
    "the metadata has ss_network_alpha 1, the tensors 3, 4, 10, which count; "
    "the metadata has ss_network_dim 4, the tensors 2, which count"
)


def assert_adds(lora: Lora, expected_alphas: dict[str, float], dtype: torch.dtype) -> None:
    """Merged in float64, each layer is W + alpha / r B A, and all others are as they were."""
    base = tiny_transformer().double()
    tuned = copy.deepcopy(base)
    line = apply_lora(tuned, lora, merge=True)
    changes = []
    for name, weight in base.state_dict().items():
        layer, found = name.removesuffix(".weight"), tuned.state_dict()[name]
        if layer not in expected_alphas:
            assert torch.equal(found, weight), name
            continue
        a, b = (tensor.to(dtype).double() for tensor in factors()[layer])
        delta = expected_alphas[layer] / RANKS[layer] * b @ a
        torch.testing.assert_close(found, weight + delta, rtol=1e-12, atol=1e-12)
        changes.append((delta.norm() / weight.norm()).item())
    changes = sorted(changes)
    told = re.fullmatch(
        rf"LoRA: {len(changes)} of (\d+) linear layers changed, by (.*)% of .* median and (.*)% at most \(.*", line
    )
    assert int(told[1]) == len(sizes())
    assert [float(told[2]), float(told[3])] == pytest.approx([100 * median(changes), 100 * changes[-1]], rel=0.01)


@pytest.mark.parametrize("kind", FILES)
def test_a_file_adds_what_its_tool_means(tmp_path, kind):
    tensors, told, expected = FILES[kind]
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "mine.safetensors", told)
    by_file, by_folder = (read_lora(path, sizes()) for path in (tmp_path / "mine.safetensors", tmp_path))
    assert_adds(by_file, expected, next(iter(tensors.values())).dtype)
    assert by_folder.config() == by_file.config()
    assert by_file.remark == {"kohya": SAYS_OTHERWISE}.get(kind, by_file.remark)
    assert ("the scale is 1" in by_file.remark) == (expected is ONES and "by diffusers" not in kind)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_what_peft_saves_computes_what_peft_computes(tmp_path, settings):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        rank_pattern={"to_q": 2},
        alpha_pattern={"to_k": 1},
        init_lora_weights=False,
        **settings,
    )
    theirs = get_peft_model(tiny_transformer(), config)
    for name, parameter in theirs.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.linspace(0.5, 1.5, len(parameter))
    theirs.save_pretrained(tmp_path)
    merged = theirs.merge_and_unload().state_dict()
    assert find_lora_file(tmp_path).name == PEFT_FILE
    for merge in (True, False):
        ours = tiny_transformer()
        apply_lora(ours, read_lora(tmp_path, sizes()), merge=merge)
        ours.fuse_lora() if not merge else None
        found = {name.replace("base_layer.", ""): tensor for name, tensor in ours.state_dict().items()}
        for name, tensor in merged.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outer", ["", "transformer."])
def test_patterns_are_of_the_names_that_the_training_had(tmp_path, outer):
    """As of a module around the transformer, where peft gave the layers longer names."""
    save_file(keys(f"base_model.model.{outer}{{name}}.{{half}}.weight"), tmp_path / PEFT_FILE)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    patterns = {f"^{re.escape(outer + name)}": name for name in (OUT, FF)}
    config |= {"rank_pattern": {key: RANKS[name] for key, name in patterns.items()}}
    config |= {"alpha_pattern": {key: ALPHAS[name] for key, name in patterns.items()}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert_adds(read_lora(tmp_path, sizes()), ALPHAS, torch.float32)
    before = Variant(lora=tmp_path).identity()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    assert Variant(lora=tmp_path).identity() != before, "videos of another scale are others"


def changed(**changes) -> dict[str, torch.Tensor]:
    """The tensors of a good file, with other ones for Q's A or B, None for none."""
    return {
        k: v
        for k, v in (keys() | {f"transformer.{Q}.lora_{n}.weight": v for n, v in changes.items()}).items()
        if v is not None
    }


NAN = torch.full((4, 32), torch.nan)
REFUSED = {
    "nothing": ({}, {"format": "pt"}, "got no tensor"),
    "a missing half": (changed(B=None), {}, f"got no lora_B for {Q}, expected both halves"),
    "NaN": (changed(A=NAN), {}, f"got NaN or infinity in a of {Q}"),
    "infinity in half precision": (changed(B=torch.full((32, 4), 1e9).half()), {}, "got NaN or infinity in b"),
    "two ranks": (changed(A=torch.ones(3, 32)), {}, r"got A \(3, 32\) and B \(32, 4\) .* of one rank"),
    "another model": (changed(A=torch.ones(4, 64)), {}, r"got another model's adapter: .* where it is \(32, 32\)"),
    "a convolution": (changed(A=torch.ones(4, 32, 1, 1)), {}, r"got A \(4, 32, 1, 1\) and B"),
    "whole numbers": (changed(A=torch.ones(4, 32, dtype=torch.int8)), {}, "got torch.int8 in a"),
    "another rank": (keys(), metadata(r=8), f"got rank 4 for {Q}, and 8 in its metadata"),
    "kohya's alpha for another rank": (
        FLAT,
        {"ss_network_dim": "4", "ss_network_alpha": "1"},
        f"got rank 2 for {OUT}, and an alpha only in the metadata, for ss_network_dim 4",
    ),
    "another alpha": (keys() | alphas("transformer.{name}.alpha"), metadata(lora_alpha=8), "got alpha 4 .*, and 8 in"),
    "an endless alpha": (keys(), metadata(lora_alpha=math.inf), "got a damaged file .*alphas"),
    "alpha 0": (keys() | {f"transformer.{Q}.alpha": torch.tensor(0.0)}, {}, "got alpha 0.0 for"),
    "damaged metadata": (keys(), {"lora_adapter_metadata": "{"}, "got a damaged file"),
    "DoRA without magnitudes": (keys(), metadata(use_dora=True), "got use_dora=True for .* expected magnitudes"),
    "magnitudes of one layer": (
        keys() | {f"transformer.{Q}.lora_magnitude_vector": torch.ones(32)},
        {},
        "of some layers",
    ),
    "PiSSA": (keys(), metadata(init_lora_weights="pissa"), "got init_lora_weights='pissa', with which the base was ch"),
    "another kind": (keys(), metadata(peft_type="ADALORA"), "got an adapter of the kind ADALORA, expected LoRA"),
    "a field of later versions": (keys(), metadata(use_qalora=True), "got use_qalora=True, expected plain LoRA"),
    "biases": (keys() | {f"transformer.{Q}.lora_B.bias": torch.ones(32)}, {}, r"got LoRA with biases \(lora_bias\)"),
    "two adapters": (
        keys("{name}.{half}.a.weight") | {f"{OUT.replace('1', '0', 1)}.lora_A.b.weight": torch.ones(2, 32)},
        {},
        "got 2 adapters, a, b, expected one",
    ),
    "one layer twice": (keys() | keys("diffusion_model.{name}.{half}.weight"), {}, "got two tensors for a of"),
    "one layer twice, by diffusers": (
        keys("{name}.{half}.weight") | keys("{name}.{half}.weight", a="lora.down", b="lora.up"),
        {},
        "got tensors under diffusers' names of today and of before",
    ),
    "peft's file without its config": (keys("base_model.model.{name}.{half}.weight"), {}, "adapter_config.json beside"),
    "layers that fit nothing": (
        keys() | {"transformer.blocks_9.x.lora_A.weight": torch.ones(2, 2)},
        {},
        "got layers that this transformer does not have, 1 of them, such as transformer.blocks_9.x",
    ),
    "weights of a model": (keys() | {f"transformer.{Q}.weight": torch.ones(32, 32)}, {}, "which belongs to no LoRA"),
    "a text encoder": ({"lora_te1_text_model_x.lora_down.weight": torch.ones(2, 2)}, {}, "LoRA of a text encoder"),
    "LoKr": ({f"lycoris_{Q}.lokr_w1": torch.ones(2, 2)}, {}, r"got LoKr \(LyCORIS\), expected a LoRA"),
    "LoHa": ({f"lora_unet_{Q}.hada_w1_a": torch.ones(2, 2)}, {}, r"got LoHa \(LyCORIS\)"),
    "kohya's DoRA": (FLAT | {f"lora_unet_{Q.replace('.', '_')}.dora_scale": torch.ones(32)}, {}, "got DoRA as kohya"),
    "Stable Diffusion 3's names": (
        {"diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight": torch.ones(2, 32)},
        {},
        "got LoRA in Stable Diffusion 3's own names",
    ),
    "Wan": ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(2, 32)}, {}, "got LoRA of Wan"),
    "FLUX": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 32)}, {}, "got LoRA of FLUX"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_exactly_is_refused_by_its_cause(tmp_path, kind):
    tensors, told, message = REFUSED[kind]
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / ADAPTER_FILE, told)
    with pytest.raises(ValueError, match=f"{ADAPTER_FILE}: .*{message}") as error:
        read_lora(tmp_path, sizes())
    assert "; " in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("folder", "told"), [("default_keys", None), ("nan_lora", "got NaN or infinity in")])
def test_files_that_once_gave_noise_in_silence(folder, told):
    path = Path(__file__).parents[1] / "data" / "faults" / folder
    name, sizes = "transformer_blocks.0.attn.to_q", {"transformer_blocks.0.attn.to_q": (160, 160)}
    if told:
        with pytest.raises(ValueError, match=told):
            read_lora(path, sizes)
        return
    a, b = load_file(path / ADAPTER_FILE).values()
    layer = read_lora(path, sizes).layers[name]
    torch.testing.assert_close(layer.merge(torch.zeros(160, 160).double()), b.double() @ a.double())


def test_other_places_are_told_from_adapters(tmp_path):
    for name in ("a", "b"):
        save_file(keys(), tmp_path / f"{name}.safetensors")
    (tmp_path / "pickle.bin").touch()
    for path, told in ((tmp_path, "got 2 files, a.*, b.*, expected"), (tmp_path / "pickle.bin", "such as a pickle")):
        with pytest.raises(ValueError, match=told):
            read_lora(path)
    (tmp_path / "two").mkdir()
    for name in (PEFT_FILE, ADAPTER_FILE):
        save_file(keys(), tmp_path / "two" / name)
    with pytest.raises(ValueError, match="got 2 files, adapter_model.*, pytorch_lora_weights.*, expected"):
        read_lora(tmp_path / "two")
    (tmp_path / "vera").mkdir()
    get_peft_model(tiny_transformer(), VeraConfig(r=2, target_modules=["to_q"])).save_pretrained(tmp_path / "vera")
    with pytest.raises(ValueError, match="adapter of the kind VERA"):
        read_lora(tmp_path / "vera")


def test_kohyas_names_are_one_to_one_with_the_layers_of_the_full_model():
    names = linear_sizes(SIZES["transformer"])
    assert len({name.replace(".", "_") for name in names}) == len(names) > 500


@pytest.mark.parametrize("alpha", [3.0, 4.0])
def test_ranks_add(alpha):
    """The sum of two LoRAs in float64 is one after the other, where they meet and where not."""
    draw = torch.Generator().manual_seed(1)
    first = Lora({name: LoraLayer(*factors()[name], ALPHAS[name]) for name in (Q, FF)})
    more = {name: [torch.randn(shape, generator=draw) for shape in ((3, 32), (32, 3))] for name in (Q, OUT)}
    second = Lora({name: LoraLayer(*pair, alpha) for name, pair in more.items()})
    found = first.then(second).layers
    assert found.keys() == {Q, FF, OUT}
    for name, layer in found.items():
        weight = torch.zeros(sizes()[name], dtype=torch.float64)
        expected = weight
        for lora in (first, second):
            expected = lora.layers[name].merge(expected) if name in lora.layers else expected
        torch.testing.assert_close(layer.merge(weight), expected, rtol=1e-6, atol=1e-6)


def test_a_scale_that_float32_cannot_hold_is_refused():
    lora = Lora({name: LoraLayer(*pair, ALPHAS[name]) for name, pair in factors().items()})
    with pytest.raises(ValueError, match=f"{Q}: got B times 1e[+]39 and 1, which is not finite, expected .*; choose"):
        lora.scaled(1e39, fold=True)


def test_equal_tensors_give_equal_bytes(tmp_path):
    lora = Lora({name: LoraLayer(*pair, ALPHAS[name]) for name, pair in factors().items()}, distilled=True)
    seen = set()
    for i in range(8):
        lora.save(tmp_path / f"{i}" / ADAPTER_FILE)
        seen.add((tmp_path / f"{i}" / ADAPTER_FILE).read_bytes())
        lora = read_lora(tmp_path / f"{i}", sizes())
    assert len(seen) == 1
    assert lora.distilled


def test_magnitudes_are_scaled_from_those_of_the_base():
    """Scale 0 is the base; 0.5 is half way from its norms to the magnitudes, along half of BA."""
    base = tiny_transformer().get_submodule(Q).weight
    (a, b), norms = factors()[Q], base.norm(dim=1)
    learnt = norms * torch.linspace(0.5, 1.5, len(norms))
    lora = Lora({Q: LoraLayer(a, b, 6.0, learnt)})
    for scale in (0.0, 0.5, 1.0, 2.0):
        direction = base + scale * 6 / 4 * b @ a
        expected = direction / direction.norm(dim=1, keepdim=True) * norms.lerp(learnt, scale)[:, None]
        for merge in (True, False):
            transformer = tiny_transformer()
            assert apply_lora(transformer, lora, scale, merge).startswith(f"LoRA: {scale > 0:d} of {len(sizes())} lin")
            transformer.fuse_lora() if not merge else None
            layer = transformer.get_submodule(Q)
            found = layer.weight if merge else layer.base_layer.weight
            torch.testing.assert_close(found, base if scale == 0 else expected, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_base_is_rounded_once():
    lora = Lora({name: LoraLayer(*pair, ALPHAS[name]) for name, pair in factors().items()})
    base, tuned = (tiny_transformer().to(torch.bfloat16) for _ in range(2))
    apply_lora(tuned, lora, merge=True)
    for name, layer in lora.layers.items():
        exact = base.get_submodule(name).weight.double() + layer.scale * layer.b.double() @ layer.a.double()
        assert (tuned.get_submodule(name).weight.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
        rounded = exact.to(torch.bfloat16)
        assert (tuned.get_submodule(name).weight == rounded).float().mean() > 0.99


@pytest.mark.parametrize(
    "read",
    [
        lambda run: export_merged(run, run / "out"),
        lambda run: export_adapter(run, run / "out"),
        lambda run: Variant(lora=run / "adapter").check(),
        lambda run: read_lora(run),
    ],
)
def test_an_adapter_beside_trained_blocks_of_an_older_version_is_refused(tmp_path: Path, read):
    (tmp_path / "adapter").mkdir()
    for file in ("config.yaml", f"adapter/{ADAPTER_FILE}", "adapter/trained_blocks.safetensors"):
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=r"got trained_blocks.*, expected an adapter alone; use that version, or"):
        read(tmp_path)
    assert not (tmp_path / "out").exists()
