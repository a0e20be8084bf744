"""Text embeddings, computed once per prompt, so that training needs no text encoders."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

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
    lend_encoder: Callable[[str], AbstractContextManager] = nullcontext,
) -> PromptCache:
    """Encode each distinct text once, in the dtype of the encoders, one encoder after another.

    Texts are the prompts and the negative prompts of their rows, by default negative_prompt. All
    batches have one size, because the rounding of products depends on it: a resumed run encodes
    only the remaining prompts and needs the same embeddings to the bit.

    lend_encoder: a context, by an encoder's name, inside of which the pipeline has that encoder.
    """
    prompts = list(prompts)
    negatives = [negative_of(prompt, negative_prompt) for prompt in prompts]
    unique = list(dict.fromkeys(map(str, [*prompts, *negatives])))
    pipe.warn_of_truncation(unique, max_sequence_length)
    padded = unique + unique[-1:] * (-len(unique) % batch)
    starts = range(0, len(padded), batch)
    parts, encode = {}, pipe.encode_part
    for name in pipe.family.text_encoders:
        with lend_encoder(name):
            batches = [[x.cpu() for x in encode(name, padded[i : i + batch], max_sequence_length)] for i in starts]
            parts[name] = tuple(torch.cat(column)[: len(unique)] for column in zip(*batches, strict=True))
    return PromptCache(unique, *pipe.join_parts(parts), negative_prompt)
