"""Text embeddings, computed once per prompt, so that training needs no text encoders."""

from collections.abc import Iterable

import torch

from rlhf.generator.pipeline import VideoPipeline
from rlhf.types import Conditioning, negative_of

ENCODE_BATCH = 16


class PromptCache:
    """Embeddings of a run's prompts and negative prompts, on the CPU.

    negative_prompt: of prompts whose row has none. Shape suffixes: N texts, L tokens, D width, P
    pooled width.
    """

    def __init__(self, texts: list[str], embeds_NLD: torch.Tensor, pooled_NP: torch.Tensor, negative_prompt: str):
        self.index = {text: i for i, text in enumerate(texts)}
        self.embeds_NLD, self.pooled_NP, self.negative_prompt = embeds_NLD, pooled_NP, negative_prompt

    def __call__(self, prompts: list[str], device: torch.device | str) -> Conditioning:
        """Return the conditioning of a batch of encoded prompts, on the device."""
        texts = prompts, [negative_of(prompt, self.negative_prompt) for prompt in prompts]
        positive, negative = ([self.index[text] for text in batch] for batch in texts)
        return Conditioning(
            self.embeds_NLD[positive], self.pooled_NP[positive], self.embeds_NLD[negative], self.pooled_NP[negative]
        ).to(device)


@torch.no_grad()
def encode_prompts(
    pipe: VideoPipeline,
    prompts: Iterable[str],
    negative_prompt: str,
    max_sequence_length: int,
    batch: int = ENCODE_BATCH,
    known: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> PromptCache:
    """Encode each distinct text once, with `pipe.encode_texts`, in the dtype of the encoders.

    known: embeddings (L, D) and pooled ones (P,), on the CPU, of texts that were encoded before.

    Texts are the prompts and the negative prompts of their rows, by default negative_prompt. All
    batches have one size, because the rounding of products depends on it: a resumed run encodes
    only the remaining prompts and needs the same embeddings to the bit.
    """
    prompts = list(prompts)
    negatives = [negative_of(prompt, negative_prompt) for prompt in prompts]
    unique = list(dict.fromkeys(map(str, [*prompts, *negatives])))
    pipe.warn_of_long(unique, max_sequence_length)
    rows = dict(known or {})
    new = [text for text in unique if text not in rows]
    padded = new + new[-1:] * (-len(new) % batch)
    for i in range(0, len(padded), batch):
        encoded = _encode(pipe, padded[i : i + batch], max_sequence_length)
        rows |= dict(zip(new[i : i + batch], zip(*encoded, strict=True), strict=False))
    embeds, pooled = (torch.stack(parts) for parts in zip(*(rows[text] for text in unique), strict=True))
    return PromptCache(unique, embeds, pooled, negative_prompt)


def _encode(pipe: VideoPipeline, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings (B, L, D) and pooled embeddings (B, P) on the CPU."""
    embeds, pooled = pipe.encode_texts(prompts, max_sequence_length)
    return embeds.cpu(), pooled.cpu()
