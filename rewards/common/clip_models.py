"""Image and text encoders of transformers and open_clip with one interface.

Shape legend: B batch, C channels, N frames, H height, W width, P width of the joint embedding.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F

from rewards.common.preprocess import CLIP_MEAN, CLIP_STD, preprocess
from rewards.common.weights import (
    Frozen,
    load_pretrained,
    load_tokenizer,
    missing_weights_error,
    offline_if_unreachable,
)
from rewards.contract import RewardError, at_least_float32

CLIP_B32, CLIP_L14 = "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
CLIP_H14, SIGLIP_384 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "google/siglip-so400m-patch14-384"


def _tower_config(width: int, heads: int, layers: int, **others) -> dict:
    """Return the settings of a text or vision tower; `others` are added as they are."""
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_hidden_layers": layers}
    return {"intermediate_size": 4 * width} | sizes | others


# Settings of transformers' CLIPConfig (SiglipVisionConfig), as in their config.json; the rest are
# its defaults.
SIZES = {
    CLIP_B32: {},
    CLIP_L14: {
        "projection_dim": 768,
        "text_config": _tower_config(768, heads=12, layers=12),
        "vision_config": _tower_config(1024, heads=16, layers=24, patch_size=14),
    },
    CLIP_H14: {
        "projection_dim": 1024,
        "text_config": _tower_config(1024, heads=16, layers=24, hidden_act="gelu"),
        "vision_config": _tower_config(1280, heads=16, layers=32, hidden_act="gelu", patch_size=14),
    },
    SIGLIP_384: _tower_config(1152, heads=16, layers=27, intermediate_size=4304, patch_size=14, image_size=384),
}


def l2_normalize(features: torch.Tensor) -> torch.Tensor:
    """Normalise to unit length along the last axis, in at least float32."""
    return F.normalize(at_least_float32(features), dim=-1)


def learned_scale(model: torch.nn.Module) -> torch.Tensor:
    """Return exp(logit_scale) of a CLIP in at least float32; bfloat16 would round 100 to 98.9."""
    return at_least_float32(model.logit_scale.detach()).exp()


class ImageEncoder(Frozen):
    """An image encoder. Subclasses define encode_images(pixels) -> (N, P)."""

    size: int  # side of the square input in pixels
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    fit: str = "shortest"

    def embed(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Return unit embeddings (N, P), in at least float32, of frames in [0, 1]."""
        return l2_normalize(self.encode_images(self.pixels(frames_NCHW).to(self.dtype)))

    def pixels(self, frames_NCHW: torch.Tensor) -> torch.Tensor:
        """Return the model's input (N, C, size, size): frames in [0, 1], resized and normalised."""
        return preprocess(frames_NCHW, self.size, self.image_mean, self.image_std, self.fit)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(self.parameters()).dtype


class Clip(ImageEncoder):
    """An encoder of images and text. Subclasses also define encode_text(prompts) -> (B, P)."""

    def __init__(self, model: torch.nn.Module, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self._scale = learned_scale(model)

    @property
    def scale(self) -> torch.Tensor:
        """The factor on cosines in training, exp(logit_scale), in at least float32."""
        return self._scale.to(self.device)


class TransformersClip(Clip):
    """A CLIPModel of transformers."""

    fit = "shortest_floor"  # of its image processor

    def __init__(self, model: torch.nn.Module, tokenizer):
        super().__init__(model, tokenizer)
        self.size = model.config.vision_config.image_size
        self.freeze()

    def encode_images(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Return image features (N, P) of preprocessed pixels, not normalised."""
        return self.model.get_image_features(pixel_values=pixels_NCHW).pooler_output

    def encode_text(self, prompts: list[str]) -> torch.Tensor:
        """Return text features (B, P) of the prompts, not normalised; long ones are truncated."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output


class OpenClip(Clip):
    """A model of open_clip with the preprocessing of its configuration."""

    def __init__(self, model: torch.nn.Module, tokenizer):
        super().__init__(model, tokenizer)
        config = model.visual.preprocess_cfg
        size, self.fit = config["size"], config["resize_mode"]
        self.size = size if isinstance(size, int) else size[0]
        self.image_mean, self.image_std = tuple(config["mean"]), tuple(config["std"])
        if self.fit == "longest" or config["interpolation"] == "bilinear":
            got = f"an open_clip model preprocessed with {self.fit!r}, {config['interpolation']!r}"
            expected = "'shortest' or 'squash' with bicubic interpolation"
            raise RewardError("clip_score", got=got, expected=expected, cure="choose another CLIP model")
        self.freeze()

    def encode_images(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Return image features (N, P) of preprocessed pixels, not normalised."""
        return self.model.encode_image(pixels_NCHW)

    def encode_text(self, prompts: list[str]) -> torch.Tensor:
        """Return text features (B, P) of the prompts, not normalised; long ones are truncated."""
        return self.model.encode_text(self.tokenizer(prompts).to(self.device))


class Siglip(ImageEncoder):
    """The attention-pooled vision tower of a SigLIP of transformers."""

    fit, image_mean, image_std = "squash", (0.5,) * 3, (0.5,) * 3

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.size = model, model.config.image_size
        self.freeze()

    def encode_images(self, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        """Return image features (N, P) of preprocessed pixels, not normalised."""
        return self.model(pixel_values=pixels_NCHW).pooler_output


def load_clip(name: str, model: str | Clip, backend: str | None = None, pretrained: str | None = None) -> Clip:
    """Load a frozen CLIP with the arguments of ClipScore; return a Clip unchanged.

    Raises RewardError for a folder that does not exist, an unknown backend and missing weights.
    """
    if isinstance(model, Clip):
        return model
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().is_dir():
        raise RewardError(name, got=f"model={model!r}", expected="a folder that exists", cure="correct the path")
    backend = backend or guess_backend(model, pretrained)
    if backend not in ("transformers", "open_clip"):
        cure = "correct the backend, or leave it out"
        raise RewardError(name, got=f"backend={backend!r}", expected="'transformers' or 'open_clip'", cure=cure)
    return _load_transformers(name, model) if backend == "transformers" else _load_open_clip(name, model, pretrained)


def crop_as_openai(clip: Clip) -> Clip:
    """Have the CLIP crop as OpenAI's transform does, not as transformers does; return the CLIP.

    The offset of the crop is rounded, not floored. Rewards published with that transform need it.
    """
    clip.fit = "shortest" if clip.fit == TransformersClip.fit else clip.fit
    return clip


def load_siglip(name: str, model: str | Siglip) -> Siglip:
    """Load the vision tower of a SigLIP from a hub id or folder; return a Siglip unchanged."""
    if isinstance(model, Siglip):
        return model
    from transformers import SiglipVisionModel

    return Siglip(load_pretrained(name, SiglipVisionModel, model))


def random_clip(model: str = CLIP_L14) -> TransformersClip:
    """Build a CLIP of `SIZES` with random weights on torch's default device."""
    from transformers import CLIPConfig, CLIPModel

    return TransformersClip(CLIPModel(CLIPConfig(**SIZES[model])), openai_tokenizer)


def random_siglip() -> Siglip:
    """Build the vision tower of the published SigLIP with random weights, as `random_clip`."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return Siglip(SiglipVisionModel(SiglipVisionConfig(**SIZES[SIGLIP_384])))


def openai_tokenizer(prompts: list[str], **_) -> Mapping[str, torch.Tensor]:
    """Tokenize with OpenAI's vocabulary to ids (B, 77) and mask, as transformers does."""
    import open_clip
    from transformers import BatchEncoding

    ids = open_clip.get_tokenizer("ViT-B-32")(prompts)
    return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def guess_backend(model: str, pretrained: str | None = None) -> str:
    """Return the library that loads a CLIP: "open_clip" or "transformers".

    It is open_clip if `pretrained` is given, and for "hf-hub:..." and "local-dir:...", a folder of
    open_clip, and a bare name such as "ViT-B-32". All others are hub ids or folders of
    transformers.
    """
    if pretrained is not None or model.startswith(("local-dir:", "hf-hub:")) or _is_open_clip_folder(model):
        return "open_clip"
    return "transformers" if "/" in model or Path(model).is_dir() else "open_clip"


def _is_open_clip_folder(model: str) -> bool:
    """Return whether the folder has open_clip's config file."""
    return (Path(model).expanduser() / "open_clip_config.json").is_file()


def _load_transformers(name: str, model: str) -> TransformersClip:
    """Load a CLIP of transformers and its tokenizer. Raises RewardError."""
    from transformers import CLIPModel

    return TransformersClip(load_pretrained(name, CLIPModel, model), load_tokenizer(name, model, "model"))


def _load_open_clip(name: str, model: str, pretrained: str | None) -> OpenClip:
    """Load an open_clip model and its tokenizer. Raises RewardError for missing weights."""
    import open_clip

    if _is_open_clip_folder(model):
        model = f"local-dir:{Path(model).expanduser()}"
    if ":" not in model and pretrained is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none: no such model in open_clip"
        expected = f"a tag or a weights file besides model={model!r} (tags: {tags})"
        cure = "set pretrained; without it open_clip would score with random weights"
        raise RewardError(name, got="pretrained=None", expected=expected, cure=cure)
    try:
        with offline_if_unreachable(local=model.startswith("local-dir:")):
            clip = open_clip.create_model(model, pretrained, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(model)
    except Exception as error:  # open_clip and the hub raise many types for missing files
        repository, key = _open_clip_source(open_clip, model, pretrained)
        raise missing_weights_error(name, repository, key, error) from error
    return OpenClip(clip, tokenizer)


def _open_clip_source(open_clip, model: str, pretrained: str | None) -> tuple[str, str]:
    """Return the source of the weights, and the argument that takes a local path instead."""
    if ":" in model:
        return model.split(":", 1)[1], "model"
    known = open_clip.get_pretrained_cfg(model, pretrained) or {}
    return known.get("hf_hub", f"{model}, {pretrained}").rstrip("/"), "pretrained"
