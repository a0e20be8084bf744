"""The cache gives what the pipeline's own encoding gives, prompt by prompt."""

import torch

from rlhf.text import encode_prompts


def test_cached_conditioning_equals_encoding_the_batch(tiny_pipe):
    prompts = ["a red fox", "rain", "a red fox"]
    cache = encode_prompts(tiny_pipe, ["rain", "a red fox", "rain"], "ugly", 24)
    cond = cache(prompts, "cpu")
    embeds, negative, pooled, negative_pooled = tiny_pipe.encode_prompt(
        prompts, None, None, device="cpu", negative_prompt="ugly", max_sequence_length=24
    )
    expected = (embeds, pooled, negative, negative_pooled)
    for got, want in zip(vars(cond).values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_each_prompt_is_encoded_once_and_without_graph(tiny_pipe, monkeypatch):
    seen, encode = [], tiny_pipe.encode_prompt
    monkeypatch.setattr(tiny_pipe, "encode_prompt", lambda **kw: seen.extend(kw["prompt"]) or encode(**kw))
    cache = encode_prompts(tiny_pipe, ["b", "a", "b"] * 20, "", 24)
    assert seen == ["b", "a", ""]
    assert not cache(["a"], "cpu").prompt_embeds_BLD.requires_grad
