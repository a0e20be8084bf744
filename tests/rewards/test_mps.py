"""MPS: the score against the published formulas written out, its mask, and files."""

import math

import pytest
import torch
from reward_checks import PROMPTS, as_is, every_check, make_video, same
from straight_line_vit import affine, attention, clip_image_tokens, clip_text_tokens, norm, part, unit
from tiny_clip import letter_tokenizer
from tiny_judges import CROSS, SIZE, clip_pixels, clip_settings, mps_model

from rewards import RewardError, load_reward
from rewards.common.weights import rename_keys
from rewards.models import mps
from rewards.models.mps import CONDITION, Mps, rotate, tokens_to_keep

CLIP_HEADS = 4


def make(**options):
    return Mps(mps_model(), letter_tokenizer(), **options)


@every_check
def test_as_any_reward_of_frames(check):
    check(make)


def test_the_scale_is_not_rounded_with_the_model():
    video, trained = make_video(), mps_model()
    trained.model.logit_scale.data.fill_(math.log(100))
    hundredfold = Mps(trained, letter_tokenizer(), dtype="bfloat16")(video, PROMPTS)
    trained.model.logit_scale.data.fill_(0.0)
    once = Mps(trained, letter_tokenizer(), dtype="bfloat16")(video, PROMPTS)
    assert hundredfold.tolist() == pytest.approx((100 * once).tolist(), rel=1e-5)


# ---------------------------------------- the formulas, in the published names


def published(prefix=""):
    """The tiny model's weights under the names of MPS_overall.pth, with what is not read."""
    ours = mps_model().state_dict()
    state = {f"cross_model.layers.{i}.1.fn.rotary_emb.inv_freq": torch.full((4,), torch.nan) for i in (0, 1)}
    state["model.text_model.embeddings.position_ids"] = torch.full((1, 24), torch.nan)
    for key, value in ours.items():
        if key.startswith("cross_model."):
            key = key.replace(".cross.", ".0.fn.").replace(".block.", ".1.fn.")
        state[key] = value
    return {prefix + key: value for key, value in state.items()}


def token_ids(texts):
    return letter_tokenizer()(
        texts, padding="max_length", truncation=True, max_length=24, return_tensors="pt"
    ).input_ids


def gated(w, x):
    up, gate = x.chunk(2, -1)
    return affine(w, "out", up * gate * torch.sigmoid(gate))


def turned(x):
    """Rotary positions by complex numbers: element d and d + D / 2 are one."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] / 10000 ** (torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], -1)


def cross_model(w, x, text, keep):
    heads, width = CROSS["heads"], CROSS["head_width"]
    for i in range(CROSS["layers"]):
        c, b = part(w, f"cross_model.layers.{i}.0.fn."), part(w, f"cross_model.layers.{i}.1.fn.")
        h = norm(c, "norm", x, 1e-5)
        k, v = affine(c, "to_kv", text).chunk(2, -1)
        seen = affine(c, "to_out", attention(affine(c, "to_q", h), k, v, heads, keep))
        x = x + seen + gated({"out.weight": c["ff.2.weight"]}, affine(c, "ff.0", h))
        h = affine(b, "fused_attn_ff_proj", norm(b, "norm", x, 1e-5))
        q, k, v, ff = h.split([heads * width, width, width, h.shape[-1] - (heads + 2) * width], -1)
        q = torch.cat([turned(head) for head in q.split(width, -1)], -1)
        seen = affine(b, "attn_out", attention(q, turned(k), v, heads))
        x = x + seen + gated({"out.weight": b["ff_out.1.weight"]}, ff)
    return x


def straight_line(w, pixels, prompts, threshold):
    ids = token_ids([CONDITION, *prompts])
    hidden = clip_text_tokens(part(w, "model.text_model."), ids, CLIP_HEADS)
    condition, *texts = affine(part(w, "model."), "text_projection", hidden)
    image = affine(
        part(w, "model."), "visual_projection", clip_image_tokens(part(w, "model.vision_model."), pixels, CLIP_HEADS)
    )
    scores = []
    for i, text in enumerate(texts):
        s = (condition @ text.T).max(0).values
        x = cross_model(w, image[i : i + 1], text[None], s / s.max() > threshold)
        end = text[(ids[i + 1] == 1).nonzero()[0, 0]]
        scores.append(w["model.logit_scale"].exp() * (unit(x[0, 0]) * unit(end)).sum())
    return torch.stack(scores)


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.95])
def test_the_score_is_the_published_formula(threshold):
    frames = as_is(SIZE)
    scores = make(mask_threshold=threshold)(frames, PROMPTS)
    same(scores, straight_line(published(), clip_pixels(frames), PROMPTS, threshold))
    assert scores.diff().abs() > 0.01


def test_the_threshold_matters_and_is_that_of_training_by_default():
    frames = as_is(SIZE)
    high = make(mask_threshold=0.95)(frames, PROMPTS)
    assert (make()(frames, PROMPTS) - high).abs().max() > 1e-3
    assert make().mask_threshold == 0.01


def test_the_largest_product_is_taken_per_prompt():
    """Not over the batch, as in the published code, where one prompt would silence another."""
    generator = torch.Generator().manual_seed(0)
    text, condition = torch.randn(2, 5, 8, generator=generator), torch.randn(7, 8, generator=generator)
    alone = tokens_to_keep(text[:1], condition, 0.6)
    beside = tokens_to_keep(torch.stack([text[0], 1000 * text[1]]), condition, 0.6)
    assert alone.any()
    assert not alone.all()
    assert torch.equal(beside[:1], alone)
    assert torch.equal(tokens_to_keep(1000 * text, condition, 0.6)[0], alone[0])  # a ratio


def test_rotary_positions_turn_the_product_by_the_distance():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64).expand(2, 1, 9, 1, 8)
    products = rotate(q)[0, :, 0] @ rotate(k)[0, :, 0].T
    for distance in range(-8, 9):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert products[0].std() > 0.1


# ---------------------------------------- files


@pytest.fixture
def tiny(monkeypatch):
    """Published files hold no sizes, so the tiny ones stand in for the module's."""
    monkeypatch.setitem(mps.SIZES, mps.CLIP_H14, clip_settings(hidden_act="gelu"))
    monkeypatch.setattr(mps, "CROSS", CROSS)


@pytest.mark.parametrize("prefix", ["", "mps."])
def test_both_published_files_are_read(tiny, tmp_path, prefix):
    from safetensors.torch import save_file

    letter_tokenizer().save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / ("model.safetensors" if prefix else "MPS_overall.pth")
    (save_file if prefix else torch.save)(published(prefix), path)
    reward = load_reward("mps", checkpoint=str(path), tokenizer=str(tmp_path / "tokenizer"))
    same(reward(make_video(), PROMPTS), make()(make_video(), PROMPTS))


def test_another_layout_is_refused(tiny, tmp_path):
    state = published()
    del state["model.visual_projection.weight"]
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(RewardError, match=r"model\.visual_projection\.weight is missing"):
        load_reward("mps", checkpoint=str(tmp_path / "partial.pth"), tokenizer=letter_tokenizer())
    assert rename_keys(state, mps.RENAMED, mps.UNUSED).keys() < mps_model().state_dict().keys()
