"""The velocity fields of a run: base, and tuned without and with gradient.

Guidance is v = v_neg + g (v_text - v_neg) (arXiv 2207.12598).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlhf.adapter.lora import disable_adapter
from rlhf.adapter.masters import MasterWeights
from rlhf.config import RewardGradientConfig
from rlhf.execution.collectives import Group, all_gather, copy_to_group
from rlhf.generator.flow import guided_velocity
from rlhf.method.adjoint import CheckpointedTransformer
from rlhf.method.regression import VelocityVJP
from rlhf.method.rollout import Velocity
from rlhf.types import Conditioning


@dataclass(frozen=True)
class Guidance:
    """Options of classifier-free guidance."""

    scale: float  # g; at 1 or less there is no guidance
    gradient: str = "full"  # as in `velocity_field`
    together: bool = False  # both branches in one batch

    @classmethod
    def from_settings(cls, args: RewardGradientConfig) -> "Guidance":
        """Return the options of classifier-free guidance that a run's settings give."""
        return cls(args.guidance_scale, args.guidance_gradient, args.guidance_together)


class VelocityFields:
    """A run's velocity fields, each a function from a batch's conditioning to a velocity.

    Args:
        transformer: the model with its adapter, whose trained numbers are those of `masters`.
        checkpoint_steps: run each velocity again in the backward pass (`rlhf.method.adjoint`).
        guidance_group: two processes that run one branch of guidance each; None for one process.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        masters: MasterWeights,
        guidance: Guidance,
        checkpoint_steps: bool = False,
        guidance_group: Group | None = None,
    ):
        self.transformer, self.masters, self.guidance = transformer, masters, guidance
        self.guidance_group = guidance_group
        self.trained = CheckpointedTransformer(transformer, masters.params) if checkpoint_steps else transformer
        self.frozen = CheckpointedTransformer(transformer, ()) if checkpoint_steps else transformer

    def base(self, cond: Conditioning) -> Velocity:
        """Return the velocity of the model before training, without gradient."""
        return disable_adapter(self.transformer)(self._field(self.transformer, cond))

    def tuned(self, cond: Conditioning) -> Velocity:
        """Return the velocity of the current model for sampling without gradient."""
        return self._field(self.transformer, cond, self._sampling_gradient)

    def old(self, cond: Conditioning) -> Velocity:
        """Return the velocity of the old policy, without gradient."""

        @torch.no_grad()
        def old(x, sigma):
            with self.masters.use(self.masters.old):
                return self.tuned(cond)(x, sigma)

        return old

    def window(self, cond: Conditioning) -> Velocity:
        """Return the velocity of the current model for steps that carry the gradient."""
        return self._field(self.trained, cond, self.guidance.gradient)

    def unguided(self, cond: Conditioning) -> Velocity:
        """Return the velocity of the current model without guidance, with gradient."""
        return self._field(self.trained, cond, "distill")

    def negative(self, cond: Conditioning) -> tuple[Velocity, Velocity]:
        """Return the negative branch's velocities: tuned, with gradient, and base, without."""
        negative = cond.negative_embeds_BLD, cond.negative_pooled_BP
        cond = Conditioning(*negative, *negative)  # with two processes each finds it where it looks
        tuned, base = self.unguided(cond), self._field(self.transformer, cond, "distill")
        return tuned, disable_adapter(self.transformer)(base)

    def base_vjp(self, cond: Conditioning) -> VelocityVJP:
        """Return the base's velocity with its vector-Jacobian product at a state."""
        velocity = self._field(self.frozen, cond)

        # The backward pass, too, must find the adapter disabled: blocks may be recomputed in it.
        @disable_adapter(self.transformer)
        def base_vjp(x, sigma, a):
            with torch.set_grad_enabled(a is not None):
                x = x.detach().requires_grad_(a is not None)
                v = velocity(x, sigma)
                return v.detach(), None if a is None else torch.autograd.grad(v, x, a)[0]

        return base_vjp

    @property
    def _sampling_gradient(self) -> str:
        """Mode of no-grad steps: "distill", which samples without guidance, else "full"."""
        return "distill" if self.guidance.gradient == "distill" else "full"

    def _field(self, transformer: Callable, cond: Conditioning, gradient: str = "full") -> Velocity:
        """Return a transformer's guided velocity, split over two processes if there are two."""
        if self.guidance_group is not None:  # at scale 1 the negative branch has no weight
            scale = 1.0 if gradient == "distill" else self.guidance.scale
            return split_velocity(transformer, cond, scale, self.guidance_group)
        guidance = self.guidance
        return velocity_field(transformer, cond, guidance.scale, gradient, guidance.together)


def velocity_field(
    transformer: Callable,
    cond: Conditioning,
    guidance_scale: float,
    gradient: str = "full",
    together: bool = False,
) -> Velocity:
    """Return a batch's guided velocity; `gradient` selects the branches that carry the gradient.

    Args:
        gradient: the mode.
            "full": both branches. Exact.
            "text": g times v_text; v_neg is a constant. Not exact: g J_text + (1 - g) J_neg loses a
                part.
            "none": v_text once; guidance is an added constant. Not exact.
            "distill": v_text alone, without guidance. Exact for an adapter that is taught guidance.
        together: whether both branches of "full" run as one batch.
    """
    scale = 1.0 if gradient == "distill" else guidance_scale

    def full(x, sigma):
        return guided_velocity(transformer, x, sigma, cond, scale, together=together)

    def one_sided(x, sigma):
        v_text = guided_velocity(transformer, x, sigma, cond, 1.0)
        with torch.no_grad():
            v_neg = guided_velocity(transformer, x, sigma, cond.negative, 1.0)
        direction = (v_text.detach() if gradient == "none" else v_text) - v_neg
        return v_text + (scale - 1) * direction

    return full if gradient == "full" or scale <= 1 else one_sided


def split_velocity(transformer: Callable, cond: Conditioning, guidance_scale: float, group: Group) -> Velocity:
    """Return the guided velocity of two processes: the first runs v_text, the second v_neg.

    Gradients are exact: x receives the sum over both branches, the adapter that of its process's.
    """
    if dist.get_rank(group) == 1:
        cond = cond.negative

    def velocity(x, sigma):
        v = guided_velocity(transformer, copy_to_group(x, group), sigma, cond, 1.0)
        v_text, v_neg = all_gather(v, group)
        return v_neg + guidance_scale * (v_text - v_neg)

    return velocity
