"""ViCLIP: how well a video fits its prompt, by a CLIP over eight frames at once (arXiv 2307.06942).

Source: OpenGVLab/InternVideo, Data/InternVid/viclip and InternVideo1/Pretrain/ViCLIP; Apache-2.0. The blocks and the
whole text tower are open_clip's; by hand is what ViCLIP adds, attention over all patches of all frames.

Shape legend: B batch, C channels, T frames, N the eight frames that are scored, H height, W width, L tokens, D width of
the vision tower, P width of the joint embedding.
"""

import torch

from rewards.common.base import encoded_once
from rewards.common.checkpointing import recompute_in_backward
from rewards.common.clip_models import unit
from rewards.common.frames import check_positive, in_chunks
from rewards.common.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, preprocess
from rewards.common.weights import Frozen, filled, hub_file, load_state_dict, torch_dtype
from rewards.contract import RewardError

REPOSITORY, FILE = "OpenGVLab/ViCLIP", "ViClip-InternVid-10M-FLT.pth"
SIZES = {  # of the published file, ViCLIP-L/14
    "vision": {"patch": 14, "resolution": 224, "frames": 8, "width": 1024, "layers": 24, "output": 768},
    "text": {"context_length": 32, "vocab_size": 49408, "width": 768, "layers": 12, "output_dim": 768},
}
HEAD_WIDTH = 64  # of every head, in both towers and in all published sizes

# What published users do before the model; they disagree, and the scores differ.
PREPROCESSING = {
    # The model's own training and evaluation, dataset/__init__.py: squashed to the square, ImageNet's mean.
    "internvideo": {"fit": "squash", "mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    # VBench's overall_consistency, utils.py clip_transform: shorter side, centre crop, CLIP's mean.
    "vbench": {"fit": "shortest", "mean": CLIP_MEAN, "std": CLIP_STD},
}


class ViClip(Frozen):
    """Cosine between video and prompt, in [-1, 1].

    Eight frames are scored, the middle ones of eight equal parts of the video; a shorter video repeats its last frame.
    Frames are resized with antialiasing, as the published code does for images; for tensors it leaves that out.

    checkpoint     the published file on disk (weights under "model", or plain); None: from the hub
    preprocessing  "internvideo", as the model was trained: whole frames, ImageNet's mean and std; or "vbench", as
                   VBench scores overall consistency: centre crop, CLIP's mean and std
    dtype          of the model; scores are float32 in any case
    chunk          videos in the model at once, to bound memory; the result stays the same
    mean, std      the typical score, for mixing

    Raises RewardError for weights that are missing, of another layout, or a pickled module.
    """

    name, frames = "viclip", "all"

    def __init__(
        self,
        checkpoint: "str | ViClipModel | None" = None,
        preprocessing: str = "internvideo",
        dtype: str = "float32",
        chunk: int | None = None,
        mean: float | None = None,
        std: float | None = None,
    ):
        super().__init__()
        check_positive(self.name, chunk=chunk)
        if preprocessing not in PREPROCESSING:
            expected = f"one of {', '.join(PREPROCESSING)}"
            raise RewardError(
                self.name, got=f"preprocessing={preprocessing!r}", expected=expected, cure="correct preprocessing"
            )
        made = isinstance(checkpoint, ViClipModel)
        self.model = (checkpoint if made else self._load(checkpoint)).to(torch_dtype(self.name, dtype))
        self.preprocessing, self.chunk, self.mean, self.std = preprocessing, chunk, mean, std
        self._texts: dict[str, tuple[torch.Tensor, ...]] = {}
        recompute_in_backward(self.model.vision_encoder.transformer.resblocks)
        self.freeze()

    def _load(self, checkpoint: str | None) -> "ViClipModel":
        state = load_state_dict(self.name, checkpoint or hub_file(self.name, REPOSITORY, FILE, "checkpoint"))
        state = {key: tensor for key, tensor in state.get("model", state).items() if key != "temp"}  # of the training
        return filled(self.name, checkpoint or FILE, lambda: ViClipModel(sizes_in(self.name, state)), state)

    @classmethod
    def random_init(cls, **settings) -> "ViClip":
        """Full size with random weights, on torch's default device, without hub or disk."""
        return cls(ViClipModel(SIZES), **settings)

    def forward(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        chosen = middle_frames(self.model.vision_encoder.num_frames, video_BCTHW.shape[2])
        with torch.autocast(video_BCTHW.device.type, enabled=False):
            video_BP = unit(in_chunks(self._embed, self.chunk, video_BCTHW[:, :, chosen]))
            return (video_BP * self.text_features(prompts).to(video_BP)).sum(1)

    def _embed(self, video_BCNHW: torch.Tensor) -> torch.Tensor:
        vision, frames_NCHW = self.model.vision_encoder, video_BCNHW.transpose(1, 2).flatten(0, 1)
        pixels_NCHW = preprocess(frames_NCHW, vision.resolution, **PREPROCESSING[self.preprocessing])
        video_BCNHW = pixels_NCHW.unflatten(0, (len(video_BCNHW), -1)).transpose(1, 2)
        return vision(video_BCNHW.to(vision.proj.dtype))

    @torch.no_grad()
    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """(B, P) unit embeddings, on the CPU; each prompt is embedded once."""
        (embeds_BP,) = encoded_once(self._texts, prompts, self._embed_text)
        return embeds_BP

    def _embed_text(self, prompts: list[str]) -> tuple[torch.Tensor]:
        import open_clip

        text = self.model.text_encoder
        ids = open_clip.SimpleTokenizer(context_length=text.context_length)(prompts)  # OpenAI's, as ViCLIP's own
        return (unit(text(ids.to(text.positional_embedding.device))),)


class ViClipModel(torch.nn.Module):
    """Both towers, under their published names. sizes: as `SIZES`."""

    def __init__(self, sizes: dict):
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer

        self.vision_encoder = VideoTransformer(**sizes["vision"])
        heads = sizes["text"]["width"] // HEAD_WIDTH
        self.text_encoder = TextTransformer(**sizes["text"], heads=heads, act_layer=QuickGELU)


class VideoTransformer(torch.nn.Module):
    """CLIP's vision transformer over the patches of all frames and one class token."""

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
        """(B, P) of normalised frames. The class token has a place in the frame, but none in time."""
        patches_BNLD = self.conv1(video_BCNHW).flatten(3).permute(0, 2, 3, 1)
        patches_BNLD = patches_BNLD + self.positional_embedding[1:] + self.temporal_positional_embedding[:, :, None]
        class_D = self.class_embedding + self.positional_embedding[0]
        tokens_BLD = torch.cat([class_D.expand(len(video_BCNHW), 1, -1), patches_BNLD.flatten(1, 2)], dim=1)
        tokens_BLD = self.ln_pre(tokens_BLD)
        for block in self.transformer.resblocks:
            tokens_BLD = block(tokens_BLD)
        return self.ln_post(tokens_BLD[:, 0]) @ self.proj


def middle_frames(count: int, total: int) -> list[int]:
    """The middle frame of each of `count` equal parts; of fewer frames each, and the last one again.

    Source: get_frame_indices of InternVideo's video_utils.py and of VBench's utils.py, sample="middle".
    """
    parts = min(count, total)
    edges = [int(i * (total / parts)) for i in range(parts)] + [total]
    middles = [(start + end - 1) // 2 for start, end in zip(edges, edges[1:], strict=False)]
    return middles + [middles[-1]] * (count - parts)


def sizes_in(name: str, state: dict[str, torch.Tensor]) -> dict:
    """`SIZES` of a checkpoint, read from its shapes."""
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
    return {
        "vision": {
            "patch": patch,
            "resolution": side * patch,
            "frames": frames,
            "width": width,
            "layers": layers[0],
            "output": output,
        },
        "text": {
            "context_length": context,
            "vocab_size": vocabulary,
            "width": text_width,
            "layers": layers[1],
            "output_dim": text_output,
        },
    }
