"""The cache gives what the pipeline's own encoding gives, prompt by prompt."""

import pytest
import torch

from rlhf.generator.files import NANO_PATH
from rlhf.generator.loading import load_pipeline
from rlhf.generator.text import ENCODE_BATCH, encode_prompts
from rlhf.types import Prompt


def test_long_prompts_are_told_in_one_line(tiny_pipe, caplog):
    prompts = ["rain", "a red fox " * 300, "a b c d e f g h i j k l m n o p"]
    told = "Of {} texts, 1 are longer than the 24 tokens that CLIP reads, and 2 than T5's 24 (max_sequence_length)"
    with caplog.at_level("WARNING"):
        encode_prompts(tiny_pipe, prompts, "", 24)
        tiny_pipe(
            prompts,
            num_frames=1,
            height=16,
            width=16,
            num_inference_steps=1,
            max_sequence_length=24,
            output_type="latent",
        )
    heads = [told.format(4), told.format(3)]
    assert [record.getMessage().split(". The longest has ")[0] for record in caplog.records] == heads
    assert all("tokens of T5: 'a red fox a red" in record.getMessage() for record in caplog.records)
    assert all(len(record.getMessage()) < 300 for record in caplog.records)


def test_cached_conditioning_equals_encoding_the_batch(tiny_pipe):
    prompts = ["a red fox", Prompt("rain", {"negative_prompt": "dry"}), Prompt("a red fox", {"negative_prompt": None})]
    cache = encode_prompts(tiny_pipe, [prompts[1], *prompts, "rain"], "ugly", 24)
    cond, negatives = cache(prompts, "cpu"), ["ugly", "dry", "ugly"]
    embeds, negative, pooled, negative_pooled = tiny_pipe.encode_prompt(
        prompts, None, None, device="cpu", negative_prompt=negatives, max_sequence_length=24
    )
    expected = (embeds, pooled, negative, negative_pooled)
    for got, want in zip(vars(cond).values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_each_prompt_is_encoded_once_and_without_graph(tiny_pipe, monkeypatch):
    tiny_pipe.text_encoder_3.requires_grad_(True)  # as one is that was just read
    seen, encode = [], tiny_pipe.encode_part
    monkeypatch.setattr(tiny_pipe, "encode_part", lambda *args: seen.append(args[:2]) or encode(*args))
    cache = encode_prompts(tiny_pipe, ["b", "a", "b"] * 20, "", 24)
    whole = ["b", "a", *[""] * (ENCODE_BATCH - 2)]
    names = "text_encoder", "text_encoder_2", "text_encoder_3"
    assert seen == [(name, whole) for name in names], "one full batch, with the negative prompt"
    assert not cache(["a"], "cpu").prompt_embeds_BLD.requires_grad


@pytest.mark.skipif(not NANO_PATH.is_dir(), reason="the nano weights are not in this checkout")
def test_an_embedding_is_the_same_to_the_bit_whatever_is_encoded_with_it():
    """A resumed run encodes only the remaining prompts."""
    pipe, prompts = load_pipeline("nano"), ["one red star", "two small blue circles", "a star falling", "a ring"]
    whole, rest = (encode_prompts(pipe, some, "", 16)(prompts[3:], "cpu") for some in (prompts, prompts[3:]))
    assert torch.equal(whole.prompt_embeds_BLD, rest.prompt_embeds_BLD)
    assert torch.equal(whole.pooled_embeds_BP, rest.pooled_embeds_BP)
