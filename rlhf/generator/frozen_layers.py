"""Frozen layers of the Wan decoder that save only what the gradient of their input needs.

Autograd saves the input of a convolution for the gradient of its weight, and half a dozen steps of
a normalisation. Here a convolution saves nothing, and norm and activation save their input.
Shape legend: B batch, C channels, T frames, H W height and width; 4-D tensors are (B*T, C, H, W).
"""

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch.autograd.function import once_differentiable

CONV = {4: F.conv2d, 5: F.conv3d}
CONV_INPUT_GRADIENT = {4: torch.nn.grad.conv2d_input, 5: torch.nn.grad.conv3d_input}
SMALLEST_NORM = 1e-12  # of F.normalize


def conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: tuple[int, ...]) -> torch.Tensor:
    """Return F.conv2d or F.conv3d at stride 1; a frozen layer saves no input for backward."""
    if weight.requires_grad or bias.requires_grad or not torch.is_grad_enabled():
        return CONV[x.ndim](x, weight, bias, padding=padding)
    return _FrozenConv.apply(x, weight, bias, padding)


def norm_silu(norm: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
    """Return SiLU(x / |x| * sqrt(C) * gamma) in at least float32; |x| is over the C channels."""
    if norm.gamma.requires_grad:
        return F.silu(norm(x))
    return _FrozenNormSilu.apply(x, norm.gamma * norm.scale)


class _FrozenConv(torch.autograd.Function):
    """A convolution that saves no tensor."""

    @staticmethod
    def forward(ctx, x, weight, bias, padding):
        """Return the convolution; keep references to the weight and the shape."""
        # Not save_for_backward: hooks that offload activations must not offload the weight.
        ctx.weight, ctx.shape, ctx.padding = weight, x.shape, padding
        return CONV[x.ndim](x, weight, bias, padding=padding)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradient of x, which needs the weight alone."""
        input_gradient = CONV_INPUT_GRADIENT[len(ctx.shape)]
        return input_gradient(ctx.shape, ctx.weight, grad, padding=ctx.padding), None, None, None


class _FrozenNormSilu(torch.autograd.Function):
    """RMS norm and SiLU that save their input."""

    @staticmethod
    def forward(ctx, x, gamma):
        """Return SiLU(x / |x| * gamma); save x."""
        ctx.save_for_backward(x)
        ctx.gamma = gamma
        unit, _ = _unit_vectors(x)
        return F.silu(unit.mul_(gamma), inplace=True).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Return the gradient of x; normalise x again."""
        (x,) = ctx.saved_tensors
        unit, inverse = _unit_vectors(x)
        grad = torch.ops.aten.silu_backward(grad.to(unit.dtype), unit * ctx.gamma).mul_(ctx.gamma)
        along = (unit * grad).sum(1, keepdim=True)
        return grad.addcmul_(unit, along, value=-1).mul_(inverse).to(x.dtype), None


def _unit_vectors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x / |x| over channels (dim 1), in at least float32, and 1 / |x|."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Not vector_norm: over channels, which are not innermost, it is thirty times slower on a CPU.
    inverse = x.square().sum(1, keepdim=True).clamp_min_(SMALLEST_NORM**2).rsqrt_()
    return x * inverse, inverse
