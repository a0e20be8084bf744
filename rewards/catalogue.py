"""The built-in rewards and their weights, as plain data; `python -m rewards.list` prints it."""

from dataclasses import dataclass

ENTRY_POINT_GROUP = "contentv_rlhf.rewards"  # for rewards of other packages

# Repository or other source of weights -> (download size, licence).
WEIGHTS = {
    "KwaiVGI/VideoReward": ("5.0 GB", "MIT"),
    "MizzenAI/HPSv3": ("16.6 GB", "MIT"),
    "OpenGVLab/ViCLIP": ("1.7 GB", "MIT, gated: its terms are to be accepted on the hub"),
    "Qwen/Qwen2-VL-2B-Instruct": ("configuration and tokenizer", "Apache-2.0"),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("16.6 GB", "Apache-2.0"),
    "Qwen/Qwen2-VL-7B-Instruct": ("configuration and tokenizer", "Apache-2.0"),
    "RE-N-Y/mpsv1": ("4.4 GB", "MIT, as the model of Kwai-Kolors/MPS"),
    "THUDM/ImageReward": ("1.8 GB", "Apache-2.0"),
    "TIGER-Lab/VideoScore-v1.1": ("16.5 GB", "MIT"),
    "bert-base-uncased": ("the tokenizer, under 1 MB", "Apache-2.0"),
    "facebook/dino-vitb16": ("343 MB", "Apache-2.0"),
    "facebook/vjepa2-vitl-fpc64-256": ("1.3 GB", "MIT, as the code of V-JEPA 2"),
    "google/siglip-so400m-patch14-384": ("3.5 GB", "Apache-2.0"),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": ("3.9 GB", "MIT"),
    "openai/clip-vit-base-patch32": ("605 MB", "MIT, as OpenAI's CLIP code"),
    "openai/clip-vit-large-patch14": ("1.7 GB", "MIT, as OpenAI's CLIP code"),
    "trl-lib/ddpo-aesthetic-predictor": ("3.7 MB", "Apache-2.0"),
    "xswu/HPSv2": ("2.0 GB", "Apache-2.0"),
    "yuvalkirstain/PickScore_v1": ("3.9 GB", "MIT"),
    "github.com/LAION-AI/aesthetic-predictor, sa_0_4_vit_l_14_linear.pth": ("4 kB", "MIT"),
    "github.com/discus0434/aesthetic-predictor-v2-5, models/aesthetic_predictor_v2_5.pth": ("2.6 MB", "AGPL-3.0"),
    "https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth": ("20.1 MB", "BSD-3-Clause"),
    "a head of `python -m rewards.distill`": ("under 10 MB", "that of its generator and of its rewards"),
    "this package": ("embedded", "Apache-2.0"),
}


@dataclass(frozen=True)
class Entry:
    """One built-in reward.

    home        module:class, imported when the reward is loaded
    input       "image", "video" or "latents", with "+ prompt" if the prompt is read
    range       of the score, higher is better
    frames      frames that are scored by default
    weights     default sources of the weights, keys of `WEIGHTS`
    parameters  of all its models together
    bytes_each  bytes per parameter with default settings
    own_path    the setting for the path of the last of `weights`, which is not downloaded: it is
                not on the hub, or its licence forbids it
    """

    home: str
    input: str
    range: str
    frames: str = "first"
    weights: tuple[str, ...] = ()
    parameters: int = 0
    bytes_each: int = 4
    own_path: str | None = None

    @property
    def licence(self) -> str:
        """The licences of the weights as text, each once; "-" without weights."""
        licences = dict.fromkeys(WEIGHTS[source][1] for source in self.weights)
        note = " (by your own path only)" if self.own_path else ""
        return ("; ".join(licences) or "-") + note

    @property
    def memory(self) -> str:
        """The size of the weights as text, such as "1.7 GB"; "-" without weights."""
        size = self.parameters * self.bytes_each
        return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB" if size else "-"


CATALOGUE = {
    "aesthetic": Entry(
        home="rewards.models.aesthetic:Aesthetic",
        input="image",
        range="unbounded; 5 average, 6.5 good",
        weights=("openai/clip-vit-large-patch14", "trl-lib/ddpo-aesthetic-predictor"),
        parameters=428_544_482,
    ),
    "aesthetic_v1": Entry(
        home="rewards.models.aesthetic:AestheticV1",
        input="image",
        range="unbounded; VBench divides it by 10",
        weights=(
            "openai/clip-vit-large-patch14",
            "github.com/LAION-AI/aesthetic-predictor, sa_0_4_vit_l_14_linear.pth",
        ),
        parameters=427_617_282,
        own_path="head",
    ),
    "aesthetic_v2_5": Entry(
        home="rewards.models.aesthetic:AestheticV25",
        input="image",
        range="unbounded; 1 to 10 usual, 5.5 good",
        weights=(
            "google/siglip-so400m-patch14-384",
            "github.com/discus0434/aesthetic-predictor-v2-5, models/aesthetic_predictor_v2_5.pth",
        ),
        parameters=429_546_785,
        own_path="head",
    ),
    "background_consistency": Entry(
        home="rewards.models.consistency:BackgroundConsistency",
        input="video",
        frames="all",
        range="0 to 1",
        weights=("openai/clip-vit-base-patch32",),
        parameters=151_277_313,
    ),
    "clip_score": Entry(
        home="rewards.models.clip:ClipScore",
        input="image + prompt",
        range="-1 to 1; .2 to .38 usual",
        weights=("openai/clip-vit-large-patch14",),
        parameters=427_616_513,
    ),
    "flicker": Entry(home="rewards.models.pixels:Flicker", input="video", frames="all", range="0 to 1"),
    "frame_difference": Entry(
        home="rewards.models.pixels:FrameDifference", input="video", frames="all", range="0 to 1"
    ),
    "hps_v2": Entry(
        home="rewards.models.hps:HpsV2",
        input="image + prompt",
        range="-1 to 1",
        weights=("xswu/HPSv2",),
        parameters=986_109_441,
    ),
    "hps_v2_1": Entry(
        home="rewards.models.hps:HpsV21",
        input="image + prompt",
        range="-1 to 1; .14 to .31 usual",
        weights=("xswu/HPSv2",),
        parameters=986_109_441,
    ),
    "hps_v3": Entry(
        home="rewards.models.hps_v3:HpsV3",
        input="image + prompt",
        range="unbounded; -0.2 to 10.6 published",
        weights=("MizzenAI/HPSv3", "Qwen/Qwen2-VL-7B-Instruct"),
        parameters=7_748_610_610,
        bytes_each=2,
    ),
    "image_reward": Entry(
        home="rewards.models.image_reward:ImageReward",
        input="image + prompt",
        range="unbounded; -2 to 2 usual",
        weights=("THUDM/ImageReward", "bert-base-uncased"),
        parameters=446_206_689,
    ),
    "jpeg_size": Entry(home="rewards.models.pixels:JpegSize", input="image", frames="all", range="-5 to 0"),
    "latent_reward": Entry(
        home="rewards.models.latent_reward:LatentReward",
        input="latents + prompt",
        frames="none",
        range="that of the reward that it predicts",
        weights=("a head of `python -m rewards.distill`",),
        parameters=1_743_943_493,
        bytes_each=2,
        own_path="path",
    ),
    "motion_degree": Entry(
        home="rewards.models.motion:MotionDegree",
        input="video",
        frames="all, at 8 a second",
        range="0 to 1",
        weights=("https://download.pytorch.org/models/raft_large_C_T_SKHT_V2-ff5fadd5.pth",),
        parameters=5_257_536,
    ),
    "mps": Entry(
        home="rewards.models.mps:Mps",
        input="image + prompt",
        range="exp(logit_scale) x cosine",
        weights=("RE-N-Y/mpsv1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        parameters=1_104_614_913,
    ),
    "nano_clip": Entry(
        home="rlhf.nano.rewards:NanoClip",
        input="image + prompt",
        frames="3 of all",
        range="-1 to 1",
        weights=("this package",),
        parameters=995_137,
    ),
    "nano_preference": Entry(
        home="rlhf.nano.rewards:NanoPreference",
        input="video + prompt",
        frames="all",
        range="-1 to 1",
        weights=("this package",),
        parameters=1_193_665,
    ),
    "nano_verifier": Entry(
        home="rlhf.nano.rewards:NanoVerifier",
        input="video + prompt",
        frames="all",
        range="0 or 1; no gradient",
        weights=("this package",),
        parameters=735_834,
    ),
    "pickscore": Entry(
        home="rewards.models.pickscore:PickScore",
        input="image + prompt",
        range="exp(logit_scale) x cosine; 18 to 24 usual",
        weights=("yuvalkirstain/PickScore_v1",),
        parameters=986_109_441,
    ),
    "smoothness": Entry(home="rewards.models.pixels:Smoothness", input="video", frames="all", range="0 to 1"),
    "subject_consistency": Entry(
        home="rewards.models.consistency:SubjectConsistency",
        input="video",
        frames="all",
        range="0 to 1",
        weights=("facebook/dino-vitb16",),
        parameters=85_798_656,
    ),
    "viclip": Entry(
        home="rewards.models.viclip:ViClip",
        input="video + prompt",
        frames="8 of all",
        range="-1 to 1",
        weights=("OpenGVLab/ViCLIP",),
        parameters=427_590_144,
    ),
    "video_align": Entry(
        home="rewards.models.video_align:VideoAlign",
        input="video + prompt",
        frames="all, at 2 a second",
        range="unbounded; 0 average",
        weights=("KwaiVGI/VideoReward", "Qwen/Qwen2-VL-2B-Instruct"),
        parameters=2_208_563_200,
        bytes_each=2,
    ),
    "video_score": Entry(
        home="rewards.models.video_score:VideoScore",
        input="video + prompt",
        frames="up to 48 of all",
        range="1 to 4 usual, unbounded",
        weights=("TIGER-Lab/VideoScore-v1.1",),
        parameters=8_271_704_309,
        bytes_each=2,
    ),
    "vjepa2": Entry(
        home="rewards.models.vjepa2:VJepa2",
        input="video",
        frames="all, at 4 a second",
        range="at most 0",
        weights=("facebook/vjepa2-vitl-fpc64-256",),
        parameters=325_971_328,
    ),
    "vlm_question": Entry(
        home="rewards.models.vlm_question:VlmQuestion",
        input="video + prompt",
        frames="all, at 2 a second",
        range="unbounded; 0: as likely yes as no",
        weights=("Qwen/Qwen2.5-VL-7B-Instruct",),
        parameters=8_292_166_656,
        bytes_each=2,
    ),
}
