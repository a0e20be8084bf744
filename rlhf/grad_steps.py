"""Which denoising steps carry the gradient."""


def choose_grad_steps(strategy: str, num_steps: int, num_grad: int, rng=None) -> list[int]:
    """Indices of the steps, of 0 .. num_steps-1, that the gradient runs through: sorted, unique, num_grad of them.

    strategy: "last", the last num_grad steps (DRaFT-K, arXiv 2309.17400). It draws nothing from rng, the
    `torch.Generator` of strategies that choose at random.
    """
    if not 1 <= num_grad <= num_steps:
        raise ValueError(
            f"num_grad_steps={num_grad}, expected 1 to num_inference_steps={num_steps}: only a step that is taken can "
            "carry a gradient; lower num_grad_steps"
        )
    if strategy != "last":
        raise ValueError(f"strategy={strategy!r}, expected 'last'; use that one")
    return list(range(num_steps - num_grad, num_steps))
