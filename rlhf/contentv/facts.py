"""ContentV's checkpoints: files, sizes and defaults, without importing torch."""

from rlhf.generator.registry import CONTENTV_8B, T5_XXL, ModelFamily

# Sizes of ContentV-8B, which are also the classes' defaults for keys that a config file leaves out.
SIZES = {
    "transformer": {
        "in_channels": 16,
        "patch_size": 2,
        "num_layers": 38,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
    },
    "vae": {"temperal_downsample": [False, True, True]},
    "tokenizer": {"model_max_length": 77},  # CLIP's
}
# ContentV-8B has the encoders of Stable Diffusion 3.5: CLIP L/14 (arXiv 2103.00020), OpenCLIP
# bigG/14 (arXiv 2212.07143) and the encoder of T5 v1.1 XXL (arXiv 1910.10683). The configuration
# classes supply the other values.
TEXT_ENCODERS = {
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
    "text_encoder_3": T5_XXL,
}
FAMILY = ModelFamily(
    name="ContentV",
    room="rlhf.contentv",
    # The published code checks the first, a base class, in model_index.json.
    transformer_classes=("SD3Transformer2DModel", "SD3Transformer3DModel"),
    config_files={
        "transformer": "config.json",
        "vae": "config.json",
        "scheduler": "scheduler_config.json",
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), "config.json"),
        **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), "tokenizer_config.json"),
    },
    sizes=SIZES,
    published={CONTENTV_8B: SIZES},
    text_encoders=TEXT_ENCODERS,
    longest_encoder="text_encoder_3",
    blocks="transformer_blocks",
    text_widths=("joint_attention_dim", "pooled_projection_dim"),
    card={
        "merged": "ContentV's published code loads it, too.",
        "diffusers": "The keys are those of diffusers for Stable Diffusion 3, such as\n"
        "`transformer.transformer_blocks.0.attn.to_q.lora_A.weight`.",
        "comfyui": "The keys are those of diffusers for Stable Diffusion 3, such as\n"
        "`transformer.transformer_blocks.0.attn.to_q.lora_A.weight`.\n"
        "ComfyUI's LoRA reader knows them, and the scale is multiplied into the weights, as it expects. ComfyUI itself "
        "has no\nclass for ContentV's transformer: the file is for software that brings one.",
    },
    licences={
        "nano": {"license": "apache-2.0"},
        CONTENTV_8B: {
            "license": "other",
            "license_name": "stabilityai-ai-community",
            "license_link": "https://stability.ai/community-license-agreement",
        },
    },
)
