"""ImageReward: the score against BLIP written out, the tokenizer, and files."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reward_checks import PROMPTS, as_is, every_check, make_video, same, to_pil
from straight_line_vit import affine, attention, layer, norm, part, patches
from tiny_judges import SIZE, bert_tokenizer, image_reward_model
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

from rewards import RewardError, load_reward
from rewards.common.preprocess import CLIP_MEAN, CLIP_STD
from rewards.common.weights import rename_keys
from rewards.models import image_reward
from rewards.models.image_reward import RENAMED, ImageReward


def make(**options):
    return ImageReward(image_reward_model(), bert_tokenizer(), **options)


@every_check
def test_as_any_reward_of_frames(check):
    check(make)


# ---------------------------------------- the formula, in the published names

VISION_NAMES = {"norm1": "norm1", "norm2": "norm2", "out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
VISION_NAMES |= {letter: letter for letter in "qkv"}


def published():
    """The tiny model's weights under the names of ImageReward.pt, with what is not read."""
    state = {
        "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None],
        "blip.vision_proj.weight": torch.zeros(2, 48),
        "blip.text_proj.bias": torch.zeros(2),
    }
    for key, value in image_reward_model().state_dict().items():
        if key.startswith("vision."):  # the text encoder has names like these of its own
            for old, new in reversed(RENAMED.items()):
                key = key.replace(new, old)
        key = key.replace("text.", "blip.text_encoder.", 1) if key.startswith("text.") else key
        state[key.replace("head.", "mlp.layers.", 1) if key.startswith("head.") else key] = value
    return state


def image_patches(w, pixels, heads=4):
    x = patches(w, "patch_embed.proj", pixels)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for i in range(2):
        block = part(w, f"blocks.{i}.")
        for number, letter in enumerate("qkv"):  # one matrix in the file, three in `layer`
            for kind in ("weight", "bias"):
                block[f"{letter}.{kind}"] = block[f"attn.qkv.{kind}"].chunk(3)[number]
        x = layer(block, x, heads, VISION_NAMES, 1e-6)
    return norm(w, "norm", x, 1e-6)


def attended(w, x, seen, heads=4, keep=None):
    """BERT's attention: residual, then norm."""
    q, k, v = affine(w, "self.query", x), affine(w, "self.key", seen), affine(w, "self.value", seen)
    return norm(w, "output.LayerNorm", x + affine(w, "output.dense", attention(q, k, v, heads, keep)), 1e-12)


def text_tokens(w, ids, mask, image):
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(w, "embeddings.LayerNorm", x, 1e-12)
    for i in range(2):
        block = part(w, f"encoder.layer.{i}.")
        x = attended(part(block, "attention."), x, x, keep=mask[:, None].bool())
        x = attended(part(block, "crossattention."), x, image)
        h = affine(block, "output.dense", F.gelu(affine(block, "intermediate.dense", x)))
        x = norm(block, "output.LayerNorm", x + h, 1e-12)
    return x


def straight_line(w, pixels, prompts):
    tokens = bert_tokenizer()(prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    image = image_patches(part(w, "blip.visual_encoder."), pixels)
    x = text_tokens(part(w, "blip.text_encoder."), tokens.input_ids, tokens.attention_mask, image)[:, 0]
    for i in (0, 2, 4, 6, 7):
        x = affine(w, f"mlp.layers.{i}", x)
    return (x[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_the_score_is_the_published_formula():
    frames = as_is(SIZE)
    transform = Compose([Resize(SIZE, Image.BICUBIC), CenterCrop(SIZE), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)])
    pixels = torch.stack([transform(image) for image in to_pil(frames[:, :, 0])])
    scores = make()(frames, PROMPTS)
    same(scores, straight_line(published(), pixels, PROMPTS))
    assert scores.diff().abs() > 1e-3


def test_prompts_are_padded_or_cut_to_35_tokens():
    ids, mask = make().encode_text(["a", "dog " * 100])
    assert ids.shape == mask.shape == (2, 35)
    assert mask.sum(1).tolist() == [3, 35]
    assert ids[0, 3:].eq(0).all()


# ---------------------------------------- files


@pytest.fixture
def tiny(monkeypatch):
    """The published file holds no sizes, so the tiny ones stand in for the module's."""
    config = {name: tower.config.to_dict() for name, tower in image_reward_model().named_children() if name != "head"}
    for name in ("vision", "text"):
        monkeypatch.setattr(image_reward, name.upper(), config[name])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_published_file_is_read(tiny, tmp_path, suffix):
    from safetensors.torch import save_file

    bert_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = str(tmp_path / f"ImageReward{suffix}")
    (torch.save if suffix == ".pt" else save_file)(published(), path)
    reward = load_reward("image_reward", checkpoint=path, tokenizer=str(tmp_path / "tokenizer"))
    same(reward(make_video(), PROMPTS), make()(make_video(), PROMPTS))
    added = reward.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    assert added == [len(bert_tokenizer()), len(bert_tokenizer()) + 1]


def test_another_layout_is_refused(tiny, tmp_path):
    torch.save(published() | {"mlp.layers.9.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(RewardError, match=r"head\.9\.weight: no such key"):
        load_reward("image_reward", checkpoint=str(tmp_path / "other.pt"), tokenizer=bert_tokenizer())
    assert rename_keys(published(), RENAMED, image_reward.UNUSED).keys() == image_reward_model().state_dict().keys()
