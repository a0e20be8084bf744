"""Wan 2.1's text-to-video checkpoints: files, sizes and defaults, without importing torch."""

from rlhf.generator.registry import T5_XXL, ModelFamily, SamplingDefaults

WAN_1_3B, WAN_14B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
VAE = {"temperal_downsample": [False, True, True]}
TOKENIZER = {"model_max_length": 512}  # UMT5's; longer prompts are cut
TRANSFORMER = {  # of both published models
    "patch_size": [1, 2, 2],
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
}
SMALL = TRANSFORMER | {"num_layers": 30, "num_attention_heads": 12, "ffn_dim": 8960}
LARGE = TRANSFORMER | {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
FAMILY = ModelFamily(
    name="Wan",
    room="rlhf.wan",
    transformer_classes=("WanTransformer3DModel",),
    config_files={
        "transformer": "config.json",
        "vae": "config.json",
        "scheduler": "scheduler_config.json",
        "text_encoder": "config.json",
        "tokenizer": "tokenizer_config.json",
    },
    sizes={"transformer": LARGE, "vae": VAE, "tokenizer": TOKENIZER},
    published={
        model: {"transformer": sizes, "vae": VAE, "tokenizer": TOKENIZER}
        for model, sizes in {WAN_1_3B: SMALL, WAN_14B: LARGE}.items()
    },
    text_encoders={"text_encoder": {"vocab_size": 256384} | T5_XXL},  # of UMT5 XXL (arXiv 2304.09151)
    longest_encoder="text_encoder",
    blocks="blocks",
    text_widths=("text_dim",),
    card={
        "merged": "`diffusers.WanPipeline.from_pretrained` loads it, too.",
        "diffusers": "The keys are those of diffusers, such as `transformer.blocks.0.attn1.to_q.lora_A.weight`.\n"
        "`diffusers.WanPipeline.load_lora_weights` reads the file, too.",
        "comfyui": "The keys are those of the authors' code, such as\n"
        "`diffusion_model.blocks.0.self_attn.q.lora_A.weight`, as ComfyUI reads them.\n"
        "The scale is multiplied into the weights.",
    },
    renamed=(
        (".attn1.", ".self_attn."),
        (".attn2.", ".cross_attn."),
        (".to_q", ".q"),
        (".to_k", ".k"),
        (".to_v", ".v"),
        (".to_out.0", ".o"),
        (".ffn.net.0.proj", ".ffn.0"),
        (".ffn.net.2", ".ffn.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("proj_out", "head.head"),
    ),
    sampling=SamplingDefaults(
        height=480, width=832, num_frames=81, guidance_scale=5.0, fps=16, max_sequence_length=512
    ),
    # Of images to video, and of Wan 2.2 with two transformers or another VAE.
    fixed={
        "": {"boundary_ratio": None, "expand_timesteps": False},
        "transformer": {
            "patch_size": (1, 2, 2),
            "in_channels": 16,
            "image_dim": None,
            "added_kv_proj_dim": None,
            "qk_norm": "rms_norm_across_heads",
        },
        "vae": {"is_residual": False, "patch_size": None},
    },
    licences={model: {"license": "apache-2.0"} for model in (WAN_1_3B, WAN_14B)},
)
