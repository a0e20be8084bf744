"""Text embeddings, computed once per prompt, so that training needs no text encoders."""

from collections.abc import Iterable

import torch

from rlhf.contentv.pipeline import ContentVPipeline
from rlhf.types import Conditioning

ENCODE_BATCH = 16


class PromptCache:
    """Embeddings of a run's prompts and of its negative prompt, on the CPU.

    Shape suffixes: N prompts of the run, L text tokens, D width, P pooled width.
    """

    def __init__(
        self,
        prompts: list[str],
        embeds_NLD: torch.Tensor,
        pooled_NP: torch.Tensor,
        negative: Conditioning,
    ):
        self.row = {prompt: i for i, prompt in enumerate(prompts)}
        self.embeds_NLD, self.pooled_NP, self.negative = embeds_NLD, pooled_NP, negative

    def __call__(self, prompts: list[str], device: torch.device | str) -> Conditioning:
        """Return the conditioning of a batch of encoded prompts, on the device."""
        rows, batch = [self.row[prompt] for prompt in prompts], len(prompts)
        return Conditioning(
            self.embeds_NLD[rows],
            self.pooled_NP[rows],
            self.negative.prompt_embeds_BLD.expand(batch, -1, -1),
            self.negative.pooled_embeds_BP.expand(batch, -1),
        ).to(device)


@torch.no_grad()
def encode_prompts(
    pipe: ContentVPipeline, prompts: Iterable[str], negative_prompt: str, max_sequence_length: int
) -> PromptCache:
    """Encode each distinct prompt once, with `pipe.encode_prompt`, in the dtype of the encoders.

    All batches have one size, because the rounding of products depends on it: a resumed run encodes
    only the remaining prompts and needs the same embeddings to the bit.
    """
    unique = list(dict.fromkeys(prompts))
    padded = unique + unique[-1:] * (-len(unique) % ENCODE_BATCH)
    starts = range(0, len(padded), ENCODE_BATCH)
    batches = [_encode(pipe, padded[i : i + ENCODE_BATCH], max_sequence_length) for i in starts]
    embeds, pooled = (torch.cat(parts)[: len(unique)] for parts in zip(*batches, strict=True))
    return PromptCache(unique, embeds, pooled, Conditioning(*_encode(pipe, [negative_prompt], max_sequence_length)))


def _encode(pipe, prompts: list[str], max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings (B, L, D) and pooled embeddings (B, P) on the CPU."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompt=prompts,
        prompt_2=None,
        prompt_3=None,
        device=pipe.text_encoder.device,
        do_classifier_free_guidance=False,
        max_sequence_length=max_sequence_length,
    )
    return embeds.cpu(), pooled.cpu()
