"""Scores of the rewards of videos against pipelines of public packages, on the same random weights.

`bench/reward_parity.py` runs it. Weights are random, in the published layout: RAFT at full size,
the others small. Videos are of 8 bits and two sizes. The authors' own repositories are not run.

Shape legend: B videos, C channels, T frames, N frames that are scored, H height, W width, D width.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image
from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

from rewards.common.qwen_vl import AFTER, BEFORE, QwenVl, fake_tokenizer, merge_lora, qwen2_vl_sizes
from rewards.models.motion import MotionDegree
from rewards.models.video_align import DIMENSIONS, LORA_ALPHA, MAX_PIXELS, MIN_PIXELS, PROMPT, TOKENS, VideoAlign
from rewards.models.vjepa2 import VJepa2

SIZES, FRAMES, FPS = [(320, 192), (208, 352)], 16, 8
PROMPTS = ["a red fox in the snow", "two boats", "rain on a street at night"]
SMALL_QWEN = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SMALL_VJEPA2 = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "frames_per_clip": 8}
SMALL_VJEPA2 |= {"pred_hidden_size": 48, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 2}


def videos(width: int, height: int) -> torch.Tensor:
    """Return moving soft shapes, a video for each prompt: (B, 3, T, H, W) of levels in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(len(PROMPTS), 3, 6, 9, 9, generator=generator)
    return (255 * F.interpolate(coarse, size=(FRAMES, height, width), mode="trilinear")).round() / 255


def levels(video_CTHW: torch.Tensor) -> torch.Tensor:
    """Return a video's frames as the pipelines get them: (T, C, H, W) uint8."""
    return (255 * video_CTHW).round().byte().transpose(0, 1)


def randomise(model: torch.nn.Module, scale: float) -> torch.nn.Module:
    """Draw weights that are large enough to tell videos apart."""
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        parameter.data = noise * scale + (parameter.ndim == 1)
    return model.eval().requires_grad_(False)


def motion_degree() -> tuple[Callable, Callable]:
    """Return our degree, and torchvision's RAFT after PIL with VBench's measure of its flow."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = raft_large().eval()  # its flow is about as long as the threshold
    preset = Raft_Large_Weights.C_T_SKHT_V2.transforms()

    def theirs(video_BCTHW):
        scores = []
        for video_CTHW in video_BCTHW[:, :, :: FRAMES // 3]:  # four frames
            images = [Image.fromarray(frame) for frame in levels(video_CTHW).permute(0, 2, 3, 1).numpy()]
            target = [8 * round(side * 32 / min(images[0].size)) for side in images[0].size]
            small = torch.stack(
                [preset(image, image)[0] for image in (i.resize(target, Image.BICUBIC) for i in images)]
            )
            for flow_2HW in model(small[:-1], small[1:])[-1].numpy():
                lengths = np.sort(-np.hypot(*flow_2HW).flatten())
                moved = abs(lengths[: int(lengths.size * 0.05)]).mean()
                scores.append(1 / (1 + np.exp(6 * min(target) / 256 - moved)))
        return torch.tensor(scores, dtype=torch.float32).unflatten(0, (len(video_BCTHW), -1)).mean(1)

    return MotionDegree(model, num_frames=4), theirs


def video_align() -> tuple[Callable, Callable]:
    """Return our score of merged weights, and transformers with peft's adapter, not merged."""
    sizes = qwen2_vl_sizes(vocabulary=500, width=64, inner=96, heads=4, key_value_heads=2)
    sizes["text_config"] |= SMALL_QWEN
    sizes["text_config"]["rope_parameters"] |= {"mrope_section": [2, 3, 3]}
    sizes["vision_config"] |= {"depth": 2, "embed_dim": 32, "num_heads": 2}
    ids = {token: 500 - len(TOKENS) + i for i, token in enumerate(TOKENS)}
    video_id, encode = 490, fake_tokenizer(ids | {"<placeholder>": 490})
    config = transformers.Qwen2VLConfig(**sizes, video_token_id=video_id, image_token_id=video_id + 1)
    layers = r"language_model\..*(q|k|v|o|gate|up|down)_proj"
    tuned = get_peft_model(
        transformers.Qwen2VLModel(config), LoraConfig(r=4, lora_alpha=LORA_ALPHA, target_modules=layers)
    )
    randomise(tuned, 0.1)
    merged = transformers.Qwen2VLModel(config)
    merged.load_state_dict(merge_lora(tuned.state_dict(), LORA_ALPHA, torch.float32))
    head = randomise(torch.nn.Linear(64, 1, bias=False), 1.0)
    area = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    processor = transformers.Qwen2VLVideoProcessor(size=area, cap_pixels_per_frame=False)

    def theirs(video_BCTHW):
        chosen = torch.linspace(0, FRAMES - 1, 4).round().long()  # 2 a second of 2 s
        scores = []
        for video_CTHW, prompt in zip(video_BCTHW, PROMPTS, strict=True):
            media = processor([levels(video_CTHW)[chosen]], return_tensors="pt")
            places = [video_id] * (int(media.video_grid_thw.prod()) // 4)
            text = encode(AFTER.format(text=PROMPT.format(text_prompt=prompt)))
            tokens = torch.tensor([encode(BEFORE) + places + text])
            positions = torch.arange(tokens.shape[1]).expand(3, 1, -1)
            hidden_1LD = tuned(input_ids=tokens, position_ids=positions, **media).last_hidden_state
            for token, (_, mean, std) in zip(TOKENS, DIMENSIONS.values(), strict=True):
                scores.append((head(hidden_1LD[0, (tokens[0] == ids[token]).nonzero().item()]).item() - mean) / std)
        return torch.tensor(scores).unflatten(0, (len(PROMPTS), -1)).sum(1)

    return VideoAlign(checkpoint=QwenVl(merged, head, encode, ids), dtype="float32"), theirs


def vjepa2() -> tuple[Callable, Callable]:
    """Return our score, and the loss of training by transformers' processor and model."""
    config = transformers.VJEPA2Config(**SMALL_VJEPA2)
    model, processor = randomise(transformers.VJEPA2Model(config), 0.1), transformers.VJEPA2VideoProcessor()

    def theirs(video_BCTHW):
        chosen = list(range(0, FRAMES, 2))  # 4 a second
        pixels = processor([levels(video)[chosen] for video in video_BCTHW], return_tensors="pt").pixel_values_videos
        truth, early = (model.get_vision_features(frames) for frames in (pixels, pixels[:, : len(chosen) // 2]))
        ids = torch.arange(truth.shape[1]).expand(len(truth), -1)
        shown, hidden = ids[:, : early.shape[1]], ids[:, early.shape[1] :]
        guess = model.predictor(early, [shown], [hidden]).last_hidden_state
        truth = F.layer_norm(truth, truth.shape[-1:])[:, early.shape[1] :]
        return -(guess - truth).abs().mean((1, 2))

    return VJepa2(model), theirs


PAIRS = {
    "motion_degree": (motion_degree, "torchvision's RAFT after PIL, VBench's measure of flow"),
    "video_align": (video_align, "Qwen2VLVideoProcessor, Qwen2VLModel, LoRA of peft"),
    "vjepa2": (vjepa2, "VJEPA2VideoProcessor, VJEPA2Model's encoder and predictor"),
}


@torch.no_grad()
def score_rows() -> Iterator[dict]:
    """Yield mean and largest difference of each reward's scores, and their spread over videos."""
    for name, (make, label) in PAIRS.items():
        reward, theirs = make()
        pairs = [(reward(video, PROMPTS, fps=FPS), theirs(video)) for video in (videos(*size) for size in SIZES)]
        ours, expected = (torch.cat(scores) for scores in zip(*pairs, strict=True))
        difference = (ours - expected).abs()
        figures = {"mean": difference.mean().item(), "max": difference.max().item(), "spread": expected.std().item()}
        yield {"arm": name, "pipeline": label} | figures
