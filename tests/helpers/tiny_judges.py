"""Tiny random models of image rewards in memory, and tokenizers made in code."""

import torch
from reward_checks import to_pil
from tiny_clip import letter_tokenizer

from rewards.common.clip_models import OpenClip, Siglip, TransformersClip
from rewards.models.image_reward import ImageRewardModel
from rewards.models.mps import MpsModel

SIZE = 32  # pixels
VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": SIZE, "patch_size": SIZE // 4}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CROSS = {"layers": 2, "width": 24, "heads": 3, "head_width": 8}


def random_model(build):
    """Lively: matrices that keep the size of their input; norms and biases that differ."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def bert_tokenizer():
    """One token for each letter; [CLS] first, [SEP] last."""
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(97, 123)]
    pieces += letters + [f"##{letter}" for letter in letters]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def vision(size):
    return VISION | {"image_size": size, "patch_size": size // 4}


def image_reward_model(size=SIZE):
    text = TEXT | {"vocab_size": 60, "max_position_embeddings": 40, "encoder_hidden_size": 48}
    text |= {"bos_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    return random_model(lambda: ImageRewardModel(vision(size) | {"layer_norm_eps": 1e-6}, text))


def clip_settings(size=SIZE, **both):
    """For transformers' CLIPConfig, with the tokenizer of tiny_clip, which pads with the end."""
    text = TEXT | {"vocab_size": len(letter_tokenizer()), "max_position_embeddings": 24}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1} | both
    return {"vision_config": vision(size) | both, "text_config": text, "projection_dim": 24}


def mps_model(size=SIZE):
    return random_model(lambda: MpsModel(clip_settings(size, hidden_act="gelu"), CROSS))


def clip(size=SIZE, **both):
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(**clip_settings(size, **both))
    return TransformersClip(random_model(lambda: CLIPModel(config)), letter_tokenizer())


def clip_pixels(frames):
    """First frames, (B, 3, T, SIZE, SIZE), as the processor published with CLIP prepares them."""
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    return processor(to_pil(frames[:, :, 0]), return_tensors="pt").pixel_values


def siglip(size=SIZE):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**vision(size))
    return Siglip(random_model(lambda: SiglipVisionModel(config)))


def tiny_raft():
    """torchvision's builder with few channels and two levels of correlation, for 32 pixels."""
    from torchvision.models.optical_flow import raft

    torch.manual_seed(0)
    model = raft._raft(
        feature_encoder_layers=(8, 8, 8, 8, 16),
        feature_encoder_block=raft.ResidualBlock,
        feature_encoder_norm_layer=torch.nn.InstanceNorm2d,
        context_encoder_layers=(8, 8, 8, 8, 24),
        context_encoder_block=raft.ResidualBlock,
        context_encoder_norm_layer=torch.nn.BatchNorm2d,
        corr_block_num_levels=2,
        corr_block_radius=2,
        motion_encoder_corr_layers=(16,),
        motion_encoder_flow_layers=(8, 8),
        motion_encoder_out_channels=16,
        recurrent_block_hidden_state_size=8,
        recurrent_block_kernel_size=((1, 5), (5, 1)),
        recurrent_block_padding=((0, 2), (2, 0)),
        flow_head_hidden_size=16,
        use_mask_predictor=True,
    )
    for parameter in model.update_block.flow_head.conv2.parameters():
        parameter.data *= 0.1  # flows of a pixel or so, about the threshold
    return model.eval()


def open_clip_of(twin):
    """An OpenClip with weights and tokens of a TransformersClip that has hidden_act="gelu"."""
    from dataclasses import asdict

    from open_clip.transform import PreprocessCfg

    model = as_open_clip(twin.model)
    model.visual.preprocess_cfg = asdict(PreprocessCfg(size=twin.size))
    pad = {"padding": "max_length", "truncation": True, "max_length": 24, "return_tensors": "pt"}
    return OpenClip(model, lambda prompts: twin.tokenizer(prompts, **pad).input_ids)


def as_open_clip(model, quick_gelu=False, heads=4):
    """The weights of a CLIPModel of transformers in open_clip's own classes."""
    import open_clip

    vision, text = model.config.vision_config, model.config.text_config
    towers = {}
    for name, tower in {"vision_cfg": vision, "text_cfg": text}.items():
        ratio = tower.intermediate_size / tower.hidden_size
        towers[name] = {"width": tower.hidden_size, "layers": tower.num_hidden_layers, "mlp_ratio": ratio}
    towers["vision_cfg"] |= {"image_size": vision.image_size, "patch_size": vision.patch_size}
    towers["vision_cfg"] |= {"head_width": vision.hidden_size // heads}
    towers["text_cfg"] |= {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size}
    towers["text_cfg"] |= {"heads": heads, "pad_id": 1, "eos_id": 1, "pool_type": "eos"}
    clip = open_clip.CLIP(model.config.projection_dim, **towers, quick_gelu=quick_gelu)
    clip.load_state_dict(_open_clip_names(model.state_dict()))
    return clip.eval()


def _open_clip_names(state):
    names = {
        "logit_scale": "logit_scale",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    }
    result = {name: state[key] for key, name in names.items()}
    result["text_projection"], result["visual.proj"] = (state[f"{n}_projection.weight"].T for n in ("text", "visual"))
    for kind in ("weight", "bias"):
        for ours, theirs in [("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")]:
            result[f"visual.{theirs}.{kind}"] = state[f"vision_model.{ours}.{kind}"]
        result[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
        for ours, theirs in [("text_model", "transformer"), ("vision_model", "visual.transformer")]:
            for i in range(2):
                get = lambda name, ours=ours, i=i, kind=kind: state[f"{ours}.encoder.layers.{i}.{name}.{kind}"]
                block = f"{theirs}.resblocks.{i}"
                result[f"{block}.attn.in_proj_{kind}"] = torch.cat([get(f"self_attn.{x}_proj") for x in "qkv"])
                for a, b in [("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2")]:
                    result[f"{block}.{b}.{kind}"] = get(a)
                result[f"{block}.mlp.c_fc.{kind}"] = get("mlp.fc1")
                result[f"{block}.mlp.c_proj.{kind}"] = get("mlp.fc2")
    return result
