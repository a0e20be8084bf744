"""ImageReward: human preference for an image given its prompt, by BLIP (arXiv 2304.05977).

Source: THUDM/ImageReward, ImageReward/ImageReward.py. Both towers are transformers models;
`RENAMED` maps the published keys.

Shape legend: N frames of all videos that are scored, C channels, H height, W width, L text tokens.
"""

import torch

from rewards.common.base import FrameReward
from rewards.common.heads import LinearLayers
from rewards.common.preprocess import preprocess
from rewards.common.weights import build_from_state_dict, load_published_weights, load_tokenizer, rename_keys
from rewards.contract import at_least_float32

REPOSITORY, FILE, TOKENIZER = "THUDM/ImageReward", "ImageReward.pt", "bert-base-uncased"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score on the authors' data
MAX_TOKENS = 35
ADDED_TOKENS = {"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]}  # BLIP's, to BERT's vocabulary
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6}
TEXT = {"vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
TEXT |= {"num_attention_heads": 12, "max_position_embeddings": 512, "encoder_hidden_size": 1024}


class ImageRewardModel(torch.nn.Module):
    """A vision transformer, a BERT with cross-attention, and a head on the first token.

    vision and text are settings of transformers' BlipVisionConfig and BlipTextConfig; None: the
    published ones.
    """

    def __init__(self, vision: dict | None = None, text: dict | None = None):
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.vision = BlipVisionModel(BlipVisionConfig(**(vision or VISION)))
        self.text = BlipTextModel(BlipTextConfig(**(text or TEXT)), add_pooling_layer=False)
        self.head = LinearLayers(self.text.config.hidden_size)

    def forward(self, pixels_NCHW: torch.Tensor, ids_NL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
        """Return scores (N,), in at least float32, of normalised pixels and padded tokens."""
        patches = self.vision(pixel_values=pixels_NCHW).last_hidden_state
        tokens = self.text(ids_NL, attention_mask=mask_NL, encoder_hidden_states=patches, is_decoder=False)
        raw_N = self.head(at_least_float32(tokens.last_hidden_state[:, 0])).squeeze(-1)
        return (raw_N - MEAN) / STD


class ImageReward(FrameReward):
    """Mean score of frames, about -2 to 2; mean 0 and std 1 on the authors' data.

    The prompt is truncated to 35 tokens. Only its tokens are cached, since text features depend on
    the image.

    checkpoint  path of ImageReward.pt (or .safetensors), or an ImageRewardModel; None: from the
                hub, 1.8 GB
    tokenizer   of uncased BERT: hub id, folder, or a tokenizer
    options     settings of FrameReward

    Raises RewardError for weights that are missing, of another layout, or a pickled module.
    """

    name = "image_reward"

    def __init__(self, checkpoint: str | ImageRewardModel | None = None, tokenizer=TOKENIZER, **options):
        super().__init__(**options)
        loaded = isinstance(checkpoint, ImageRewardModel)
        self.tokenizer = load_tokenizer(self.name, tokenizer)
        self.tokenizer.add_special_tokens(ADDED_TOKENS)
        self.model = (checkpoint if loaded else self._load(checkpoint)).to(self.dtype)
        self.model.head.to(torch.promote_types(self.dtype, torch.float32))
        self.size = self.model.vision.config.image_size
        self.freeze()

    def _load(self, path: str | None) -> ImageRewardModel:
        """Load the model from a checkpoint; None: the published file."""
        state = rename_keys(load_published_weights(self.name, path, REPOSITORY, FILE), RENAMED, UNUSED)
        return build_from_state_dict(self.name, path or FILE, ImageRewardModel, state)

    @classmethod
    def random_init(cls, **options) -> "ImageReward":
        """Build the reward at full size with random weights; its tokenizer has no vocabulary."""
        from transformers import BertTokenizer

        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        return cls(ImageRewardModel(), BertTokenizer(vocab={word: i for i, word in enumerate(words)}), **options)

    def encode_text(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and attention mask, (N, L) int64 each, padded to 35."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        return tokens.input_ids, tokens.attention_mask

    def score_frames(self, frames_NCHW: torch.Tensor, ids_NL: torch.Tensor, mask_NL: torch.Tensor) -> torch.Tensor:
        """Return the model's scores (N,) of frames in [0, 1] with text by `encode_text`."""
        return self.model(preprocess(frames_NCHW, self.size).to(self.dtype), ids_NL, mask_NL)


RENAMED = {
    "blip.text_encoder.": "text.",
    "mlp.layers.": "head.",
    "blip.visual_encoder.": "vision.",
    "vision.cls_token": "vision.embeddings.class_embedding",
    "vision.pos_embed": "vision.embeddings.position_embedding",
    "vision.patch_embed.proj.": "vision.embeddings.patch_embedding.",
    "vision.norm.": "vision.post_layernorm.",
    "vision.blocks.": "vision.encoder.layers.",
    ".attn.": ".self_attn.",
    ".proj.": ".projection.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
}
# Projections of BLIP's contrastive loss, and position indices.
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "position_ids")
