"""Peak host memory of one process of a run, by phase.

The bytes are those of the process's pages, mapped files included. Weights stay mapped until they
move to a device. Each phase counts the weights that it reads once.
"""

from collections import Counter
from dataclasses import dataclass

from rlhf.config import RewardGradientConfig
from rlhf.execution.offload import host_bytes
from rlhf.planner.memory import ENCODING, MemoryPlan, RewardNeeds, branches_per_batch, num_graphs
from rlhf.planner.traced import TracedModel

# Python with its libraries, measured on a CPU; on an accelerator also the vendor's libraries,
# worked out of the host memory of two runs on an H200.
CPU_PROCESS_BYTES, PROCESS_BYTES = int(0.9 * 2**30), 2 * 2**30
HOST_ACCURACY = 0.15
FILE_BYTES = 10**10  # diffusers writes files of at most so many bytes, and maps one at a time


@dataclass(frozen=True)
class HostPlan:
    """Bytes of host memory of one process, by phase."""

    phases: dict[str, int]

    @property
    def peak_phase(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=self.phases.get)

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the run."""
        return self.phases[self.peak_phase]


def plan_host(
    model: TracedModel,
    args: RewardGradientConfig,
    rewards: RewardNeeds,
    memory: MemoryPlan,
    encoder_bytes: int,
    kind: str,
) -> HostPlan:
    """Return the host memory of one process.

    memory: the plan of device memory; on a CPU it counts as host memory. encoder_bytes: weights of
    the largest text encoder. kind: the device's kind, such as "cuda".
    """
    streamed = _pinned_bytes(model) if args.stream_weights else 0
    offloaded, moved = _offloaded_bytes(model, args, rewards), model.itemsize * model.frozen.largest_block
    if kind == "cpu":
        encoding = memory.held["rewards"] + encoder_bytes
        training = memory.peak_bytes + streamed + offloaded
        phases = {ENCODING: encoding, "training": training}
    else:
        whole = model.itemsize * (model.frozen.blocks + model.frozen.rest)
        phases = {
            "loading rewards": rewards.largest_bytes,
            ENCODING: encoder_bytes,
            "loading the transformer": streamed + moved if streamed else min(whole, FILE_BYTES),
            "training": streamed + offloaded,
        }
    process = CPU_PROCESS_BYTES if kind == "cpu" else PROCESS_BYTES
    return HostPlan({name: process + size for name, size in phases.items()})


def _pinned_bytes(model: TracedModel) -> int:
    """Return the host bytes that `HostBuffers` allocates for the blocks' frozen weights."""
    blocks = model.transformer.transformer_blocks
    return host_bytes([p.nbytes for p in blocks.parameters() if not p.requires_grad], expected=True)


def _offloaded_bytes(model: TracedModel, args: RewardGradientConfig, rewards: RewardNeeds) -> int:
    """Return the bytes of the buffers for activations and for the decoder's caches."""
    batch = args.per_device_train_batch_size
    branch = model.transformer_call(args, batch * branches_per_batch(args)).forward.offloaded
    decoder = model.decoder_call(args, batch, rewards.decoded_frames).forward.offloaded
    graphs = 1 if args.stepwise_backward else num_graphs(args)
    return host_bytes(_in_turn(branch) * graphs) + host_bytes(_in_turn(decoder))


def _in_turn(buffers: Counter[int]) -> list[int]:
    """Return the sizes of buffers in an order as of a run, in which no size waits for another.

    The order matters: small buffers fill what large ones leave of a slab.
    """
    places = ((i / number, size) for size, number in buffers.items() for i in range(number))
    return [size for _, size in sorted(places)]
