"""The velocity fields of a run: of the base, of the tuned model, and the one that training rolls out."""

import torch

from rlhf.adapter.masters import Masters
from rlhf.adjoint import Stepwise
from rlhf.config import RewardGradientConfig
from rlhf.guidance_split import split_velocity
from rlhf.layout import Layout
from rlhf.lora import without_adapter
from rlhf.methods import Plan
from rlhf.prefix import KeptGuidance, by_gradient
from rlhf.sampler import Velocity, velocity_field
from rlhf.sampling_copy import SamplingCopy
from rlhf.types import Conditioning


class Fields:
    """Each field turns the conditioning of a batch into a velocity, run as the settings about speed and guidance say.

    layout: of the processes; None for one.
    """

    def __init__(self, transformer, masters: Masters, args: RewardGradientConfig, layout: Layout | None = None):
        self.guidance_group = layout and layout.guidance_group
        self.transformer, self.masters, self.args = transformer, masters, args
        self.window = Stepwise(transformer, masters.params) if args.stepwise_backward else transformer
        self.copy = None if args.sampling_weights == "own" else SamplingCopy(transformer)

    def tuned(self, cond: Conditioning) -> Velocity:
        """The velocity of the current model."""
        return self._field(self.window, cond, self.args.guidance_gradient)

    def base(self, cond: Conditioning) -> Velocity:
        """The velocity of the model before training."""
        return without_adapter(self._field(self.transformer, cond), self.transformer)

    def rolled_out(self, cond: Conditioning, plan: Plan) -> Velocity:
        """The same for one rollout of the plan, with the cheaper ways that are asked for at steps without gradient."""
        args, velocity = self.args, self.tuned(cond)
        prefix_model = self.transformer if self.copy is None else self.copy.model
        if args.guidance_every > 1:
            velocity = by_gradient(velocity, KeptGuidance(prefix_model, cond, args.guidance_scale, args.guidance_every))
        elif self.copy is not None:
            velocity = by_gradient(velocity, self._field(prefix_model, cond, args.guidance_gradient))
        return velocity

    def refresh(self) -> None:
        """After an optimizer step."""
        if self.copy is not None:
            self.copy.refresh()

    def _field(self, transformer: torch.nn.Module, cond: Conditioning, gradient: str = "full") -> Velocity:
        args = self.args
        if self.guidance_group is not None:
            return split_velocity(transformer, cond, args.guidance_scale, self.guidance_group)
        return velocity_field(transformer, cond, args.guidance_scale, gradient, args.guidance_together)
