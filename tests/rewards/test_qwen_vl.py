"""Qwen2-VL against transformers and peft: resizing, patches, chat, names, adapters, positions."""

import numpy as np
import pytest
import torch
from PIL import Image
from reward_checks import PHOTOGRAPH_SIZES, assert_grey_levels, make_video, photograph_and_noise
from tiny_qwen import WIDTH, name_in_445, random_model, save_base, tokenizer_for
from transformers import Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from rewards import RewardError
from rewards.common.preprocess import CLIP_STD
from rewards.common.qwen_vl import (
    AFTER,
    BEFORE,
    QwenVl,
    current_key_name,
    fake_tokenizer,
    load_qwen_vl,
    merge_lora,
    patchify,
    target_size,
)

BUDGETS = [(128 * 784, 448 * 448), (256 * 784, 256 * 784)]  # VideoAlign's and HPSv3's pixels
TEXT = "Rate it: <|a|> and <|b|>"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("qwen"), TEXT)


@pytest.fixture(scope="module")
def published(base):
    """transformers' model, and its weights named as in 4.45, with a head beside them."""
    model, tokenizer = random_model(base, ["<|a|>", "<|b|>"])
    state = {name_in_445(key): tensor for key, tensor in model.state_dict().items()}
    return model, tokenizer, state | {"rm_head.weight": torch.eye(WIDTH)}


def load(base, state, dtype=torch.float32, tokens=("<|a|>", "<|b|>")):
    head = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    return load_qwen_vl("test", base, state, head, list(tokens), dtype)


@pytest.fixture(scope="module")
def vlm(base, published) -> QwenVl:
    return load(base, published[2])


@pytest.mark.parametrize("budget", BUDGETS)
def test_sizes_equal_the_published_ones(budget):
    for height, width in [*PHOTOGRAPH_SIZES, *np.random.default_rng(0).integers(30, 1500, (300, 2)).tolist()]:
        assert target_size(height, width, 28, *budget) == smart_resize(height, width, 28, *budget)
    assert target_size(480, 832, 28, *BUDGETS[0]) == (336, 588)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("size", PHOTOGRAPH_SIZES)
def test_pixels_and_their_order_equal_the_processors(size, budget, vlm, monkeypatch):
    monkeypatch.setattr("rewards.common.qwen_vl.CLIP_MEAN", (0.0,) * 3)
    monkeypatch.setattr("rewards.common.qwen_vl.CLIP_STD", (1.0,) * 3)
    settings = {"size": dict(zip(["shortest_edge", "longest_edge"], budget, strict=True)), "do_normalize": False}
    for image in photograph_and_noise(*size):
        clip = torch.stack([image, image.flip(-1)])  # two frames, not alike
        ours, grid = patchify(vlm.fit(clip.transpose(0, 1)[None] / 255, *budget), 14, 2, 2)
        video = Qwen2VLVideoProcessor(**settings, cap_pixels_per_frame=False)(clip, return_tensors="pt")
        assert [list(grid)] == video.video_grid_thw.tolist()
        assert_grey_levels((ours[0] - video.pixel_values_videos) * 255)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = Qwen2VLImageProcessorPil(**settings)(picture, return_tensors="pt").pixel_values
        first_frames = ours[0].unflatten(1, (3, 2, 14, 14))[:, :, 0]
        assert_grey_levels((first_frames - picture.unflatten(1, (3, 2, 14, 14))[:, :, 1]) * 255)


def test_a_normalised_single_frame_is_seen_twice(vlm, monkeypatch):
    seen = []
    monkeypatch.setattr(vlm.model.visual, "forward", lambda x, grid_thw: seen.append(x) or 1 / 0)
    frame = make_video(1, 56, 56, batch=1)
    with pytest.raises(ZeroDivisionError):
        vlm.visual_tokens(frame)
    patches = seen[0].unflatten(1, (3, 2, 14, 14))
    assert torch.equal(patches[:, :, 0], patches[:, :, 1])
    red = patches[:, 0].mean() * CLIP_STD[0] + 0.48145466
    torch.testing.assert_close(red, frame[:, 0].mean())


def test_the_chat_is_that_of_the_published_template(published):
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": TEXT}]}]
    written = published[1].apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert written == BEFORE + "<|video_pad|>" + AFTER.format(text=TEXT)


def test_hidden_states_at_the_reward_tokens(vlm, published):
    """Against one pass of transformers' language model over the same embeddings, token by token."""
    model, tokenizer, _ = published
    video = make_video(2, 56, 84, batch=1)
    ids_NL, where_NR = vlm.tokens("test", [TEXT])
    before, after = tokenizer(BEFORE, return_tensors="pt"), tokenizer(AFTER.format(text=TEXT), return_tensors="pt")
    embed = model.get_input_embeddings()
    embeds = torch.cat([embed(before.input_ids), vlm.visual_tokens(video), embed(after.input_ids)], 1)
    hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state[0]
    places = [(after.input_ids[0] == tokenizer.convert_tokens_to_ids(t)).nonzero().item() for t in ["<|a|>", "<|b|>"]]
    expected = hidden[torch.tensor(places) + embeds.shape[1] - after.input_ids.shape[1]]
    torch.testing.assert_close(vlm(video, ids_NL, where_NR)[0], expected, atol=1e-5, rtol=1e-5)


def test_positions_count_tokens(vlm, published):
    """Not the ones in space and time of today's transformers, which score differently."""
    model, tokenizer, _ = published
    video = make_video(4, 84, 84, batch=1)
    tokens = vlm.tokens("test", [TEXT])
    patches, grid = patchify(video, 14, 2, 2)
    pads = "<|video_pad|>" * (patches.shape[1] // 4)
    ids = tokenizer(BEFORE + pads + AFTER.format(text=TEXT), return_tensors="pt").input_ids
    video_token = model.config.video_token_id
    spatial, _ = model.model.get_rope_index(ids, 2 * (ids == video_token).int(), video_grid_thw=torch.tensor([grid]))
    ours, seen = vlm(video, *tokens), []
    text = vlm.model.language_model
    hook = text.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]) or (args, kwargs | {"position_ids": spatial}),
        with_kwargs=True,
    )
    theirs = vlm(video, *tokens)
    hook.remove()
    assert torch.equal(seen[0], torch.arange(ids.shape[1]).expand(3, 1, -1))
    assert (ours - theirs).abs().max() > 0.1


def test_blocks_and_layers_are_recomputed(vlm, monkeypatch):
    from torch.utils.checkpoint import checkpoint

    calls = []
    counted = lambda *a, **k: calls.append(a) or checkpoint(*a, **k)
    monkeypatch.setattr("rewards.common.checkpointing.checkpoint", counted)
    vlm(make_video(2, 56, 56).requires_grad_(), *vlm.tokens("test", [TEXT, TEXT]))
    assert len(calls) == 4  # two vision blocks, two layers of the language model


def test_names_of_both_versions_load(base, published, vlm):
    model, _, state = published
    new = {key: tensor for key, tensor in model.state_dict().items()} | {"rm_head.weight": torch.eye(WIDTH)}
    assert {current_key_name(key) for key in state} == set(new) == {current_key_name(key) for key in new}
    loaded = load(base, new)
    for key, tensor in vlm.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_the_merged_adapter_equals_pefts():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = torch.nn.ModuleDict({"q": torch.nn.Linear(6, 5), "norm": torch.nn.LayerNorm(5)})
    tuned = get_peft_model(plain, LoraConfig(r=2, lora_alpha=8, target_modules=["q"], init_lora_weights=False))
    state = {key: tensor.clone() for key, tensor in tuned.state_dict().items()}
    merged = merge_lora(state, 8, torch.float32)
    expected = tuned.merge_and_unload().state_dict()
    assert set(merged) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(merged[key], tensor)


def test_the_vision_rotation_stays_exact_in_bfloat16(base, published):
    loaded = load(base, published[2], torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.head.weight.dtype == torch.float32
    exact = published[0].model.visual.rotary_pos_emb.inv_freq
    assert torch.equal(loaded.model.visual.rotary_pos_emb.inv_freq, exact)
    assert torch.equal(
        loaded.model.language_model.rotary_emb.inv_freq, published[0].model.language_model.rotary_emb.inv_freq
    )


def test_a_prompt_with_a_reward_token_in_it_is_refused(vlm):
    with pytest.raises(RewardError, match=r"a prompt with <\|a\|> in it"):
        vlm.tokens("test", ["<|a|> twice <|a|> and <|b|>"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("visual.blocks.0.norm1.weight"), r"visual\.blocks\.0\.norm1\.weight is missing"),
        (lambda state: state.update({"rm_head.weight": torch.zeros(3, WIDTH)}), "weight is .3, 32."),
        (lambda state: state.update({"visual.more": torch.zeros(1)}), "no such key"),
        (lambda state: state.update({"model.embed_tokens.weight": torch.zeros(9, WIDTH)}), "9, as the checkpoint has"),
    ],
)
def test_a_checkpoint_of_another_layout_is_refused(base, published, change, message):
    state = dict(published[2])
    change(state)
    with pytest.raises(RewardError, match=message):
        load(base, state)


def test_the_stand_in_tokenizer_keeps_special_tokens_whole():
    encode = fake_tokenizer({"<|a|>": 7, "<|b|>": 8})
    ids = encode(TEXT)
    assert (ids.count(7), ids.count(8)) == (1, 1)
    assert 5 <= len(ids) <= len(tokenizer_for(TEXT).encode(TEXT)) + 6
