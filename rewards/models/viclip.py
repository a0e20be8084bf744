"""ViCLIP: similarity of video and prompt by a CLIP over eight frames (arXiv 2307.06942).

Source: OpenGVLab/InternVideo, Data/InternVid/viclip and InternVideo1/Pretrain/ViCLIP; Apache-2.0.
Text tower and blocks are those of open_clip; attention over the patches of all frames is
implemented here.

Shape legend: B batch, C channels, T frames, N the eight frames that are scored, H height, W width,
L tokens, D width of the vision tower, P width of the joint embedding.
"""

import torch

from rewards.common.base import FrozenReward, encode_with_cache
from rewards.common.checkpointing import recompute_in_backward
from rewards.common.clip_models import l2_normalize
from rewards.common.frames import apply_in_chunks, require_choice
from rewards.common.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, preprocess
from rewards.common.weights import build_from_state_dict, load_published_weights
from rewards.contract import RewardError

REPOSITORY, FILE = "OpenGVLab/ViCLIP", "ViClip-InternVid-10M-FLT.pth"
SIZES = {  # of the published file, ViCLIP-L/14
    "vision": {"patch": 14, "resolution": 224, "frames": 8, "width": 1024, "layers": 24, "output": 768},
    "text": {"context_length": 32, "vocab_size": 49408, "width": 768, "layers": 12, "output_dim": 768},
}
HEAD_WIDTH = 64  # of every head, in both towers and in all published sizes

# Published pipelines, whose scores differ.
PREPROCESSING = {
    # Training and evaluation of the model, dataset/__init__.py.
    "internvideo": {"fit": "squash", "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    # VBench's utils.py: clip_transform_Image, and clip_transform, which overall_consistency takes.
    "vbench": {"fit": "shortest", "mean": CLIP_MEAN, "std": CLIP_STD},
    "vbench_mp4": {"fit": "mp4_shortest_8_bit", "mean": CLIP_MEAN, "std": CLIP_STD},
}


class ViClip(FrozenReward):
    """Cosine of video and prompt, in [-1, 1].

    Scores the middle frames of eight equal parts of the video; a shorter video repeats its last
    frame. Frames are resized with antialiasing, but for "vbench_mp4".

    checkpoint     path of the published file (weights under "model", or plain); None: from the hub
    preprocessing  "internvideo" (as in training: whole frames, ImageNet's mean and std), "vbench"
                   (centre crop, CLIP's mean and std) or "vbench_mp4" (the same without
                   antialiasing: VBench's overall consistency of mp4 files)
    options        settings of FrozenReward; chunk counts videos

    Raises RewardError for weights that are missing, of another layout, or a pickled module.
    """

    name, frames = "viclip", "all"

    def __init__(
        self,
        checkpoint: "str | ViClipModel | None" = None,
        preprocessing: str = "internvideo",
        **options,
    ):
        super().__init__(**options)
        self.preprocessing = require_choice(self.name, "preprocessing", preprocessing, PREPROCESSING)
        made = isinstance(checkpoint, ViClipModel)
        self.model = (checkpoint if made else self._load(checkpoint)).to(self.dtype)
        self._texts: dict[str, tuple[torch.Tensor, ...]] = {}
        recompute_in_backward(self.model.vision_encoder.transformer.resblocks)
        self.freeze()

    def _load(self, checkpoint: str | None) -> "ViClipModel":
        """Load the model from a checkpoint; None: the published file."""
        state = load_published_weights(self.name, checkpoint, REPOSITORY, FILE)
        state = {key: tensor for key, tensor in state.get("model", state).items() if key != "temp"}  # of training
        build = lambda: ViClipModel(infer_sizes(self.name, state))
        return build_from_state_dict(self.name, checkpoint or FILE, build, state)

    @classmethod
    def random_init(cls, **settings) -> "ViClip":
        """Build the reward at full size with random weights on torch's default device."""
        return cls(ViClipModel(SIZES), **settings)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return the cosine (B,) of each video with its prompt, in at least float32."""
        chosen = middle_frames(self.model.vision_encoder.num_frames, video_BCTHW.shape[2])
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            video_BP = l2_normalize(apply_in_chunks(self._embed, self.chunk, video_BCTHW[:, :, chosen]))
            return (video_BP * self.text_features(prompts).to(video_BP)).sum(1)

    def _embed(self, video_BCNHW: torch.Tensor) -> torch.Tensor:
        """Return embeddings (B, P) of selected frames in [0, 1]."""
        vision, frames_NCHW = self.model.vision_encoder, video_BCNHW.transpose(1, 2).flatten(0, 1)
        pixels_NCHW = preprocess(frames_NCHW, vision.resolution, **self.preprocessing)
        video_BCNHW = pixels_NCHW.unflatten(0, (len(video_BCNHW), -1)).transpose(1, 2)
        return vision(video_BCNHW.to(vision.proj.dtype))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """Return unit embeddings (B, P) on the CPU from a cache."""
        (embeds_BP,) = encode_with_cache(self._texts, prompts, self._embed_text)
        return embeds_BP

    def _embed_text(self, prompts: list[str]) -> tuple[torch.Tensor]:
        """Return unit embeddings ((B, P),) of prompts."""
        import open_clip

        text = self.model.text_encoder
        ids = open_clip.SimpleTokenizer(context_length=text.context_length)(prompts)  # OpenAI's, as ViCLIP's own
        return (l2_normalize(text(ids.to(text.positional_embedding.device))),)


class ViClipModel(torch.nn.Module):
    """Both towers with the published keys; sizes as in `SIZES`."""

    def __init__(self, sizes: dict):
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer

        self.vision_encoder = VideoTransformer(**sizes["vision"])
        heads = sizes["text"]["width"] // HEAD_WIDTH
        self.text_encoder = TextTransformer(**sizes["text"], heads=heads, act_layer=QuickGELU)


class VideoTransformer(torch.nn.Module):
    """A CLIP vision transformer over the patches of all frames and one class token."""

    def __init__(self, patch: int, resolution: int, frames: int, width: int, layers: int, output: int):
        super().__init__()
        from open_clip.transformer import QuickGELU, ResidualAttentionBlock

        self.resolution, self.num_frames = resolution, frames
        self.conv1 = torch.nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        scale = width**-0.5
        self.class_embedding = torch.nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = torch.nn.Parameter(scale * torch.randn((resolution // patch) ** 2 + 1, width))
        self.temporal_positional_embedding = torch.nn.Parameter(torch.zeros(1, frames, width))
        self.ln_pre, self.ln_post = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList(
            ResidualAttentionBlock(width, width // HEAD_WIDTH, act_layer=QuickGELU) for _ in range(layers)
        )
        self.proj = torch.nn.Parameter(scale * torch.randn(width, output))

    def forward(self, video_BCNHW: torch.Tensor) -> torch.Tensor:
        """Return embeddings (B, P) of normalised frames; the class token has no time embedding."""
        patches_BNLD = self.conv1(video_BCNHW).flatten(3).permute(0, 2, 3, 1)
        patches_BNLD = patches_BNLD + self.positional_embedding[1:] + self.temporal_positional_embedding[:, :, None]
        class_D = self.class_embedding + self.positional_embedding[0]
        tokens_BLD = torch.cat([class_D.expand(len(video_BCNHW), 1, -1), patches_BNLD.flatten(1, 2)], dim=1)
        tokens_BLD = self.ln_pre(tokens_BLD)
        for block in self.transformer.resblocks:
            tokens_BLD = block(tokens_BLD)
        return self.ln_post(tokens_BLD[:, 0]) @ self.proj


def middle_frames(count: int, total: int) -> list[int]:
    """Return the middle frame of each of `count` equal parts, padded with the last.

    Source: get_frame_indices of InternVideo's video_utils.py and of VBench's utils.py,
    sample="middle".
    """
    parts = min(count, total)
    edges = [int(i * (total / parts)) for i in range(parts)] + [total]
    middles = [(start + end - 1) // 2 for start, end in zip(edges, edges[1:], strict=False)]
    return middles + [middles[-1]] * (count - parts)


def infer_sizes(name: str, state: dict[str, torch.Tensor]) -> dict:
    """Return a checkpoint's sizes, keyed as `SIZES`. Raises RewardError for another layout."""
    vision, text = "vision_encoder.", "text_encoder."
    try:
        width, _, _, _, patch = state[f"{vision}conv1.weight"].shape
        side = round((len(state[f"{vision}positional_embedding"]) - 1) ** 0.5)
        frames, output = state[f"{vision}temporal_positional_embedding"].shape[1], state[f"{vision}proj"].shape[1]
        vocabulary, text_width = state[f"{text}token_embedding.weight"].shape
        context, text_output = len(state[f"{text}positional_embedding"]), state[f"{text}text_projection"].shape[1]
    except KeyError as error:
        expected = "vision_encoder.* and text_encoder.* of ViCLIP"
        raise RewardError(name, got=f"no {error}", expected=expected, cure=f"use {FILE} of {REPOSITORY}") from error
    layers = [len({key.split(".")[3] for key in state if key.startswith(f"{x}transformer.")}) for x in (vision, text)]
    vision_sizes = (patch, side * patch, frames, width, layers[0], output)
    text_sizes = (context, vocabulary, text_width, layers[1], text_output)
    return {
        "vision": dict(zip(SIZES["vision"], vision_sizes, strict=True)),
        "text": dict(zip(SIZES["text"], text_sizes, strict=True)),
    }
