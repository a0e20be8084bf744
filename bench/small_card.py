"""Sample the full-size model with random weights within a hard limit of device memory.

    python bench/small_card.py --folder DIR --limit_gib 12
    python bench/small_card.py --folder DIR --size tiny --device cpu     every part, in seconds

DIR gets a model in the published layout, if it is not there: 27 GiB. The planner chooses as for
`demo.py --memory_limit_gib`. PyTorch may then take the limit less what the process takes besides,
and not a byte more.
"""

import argparse
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from environment import environment, make_parser, read_rows, show_row, write_rows
from step_arms import SIZES, random_transformer, random_vae
from transformers import T5TokenizerFast

from rlhf.device import peak_memory, pick_device, reset_peak_memory, synchronize, total_memory
from rlhf.device.host import process_peak_memory
from rlhf.evaluation.sampler import Sampler
from rlhf.generator.files import NANO_PATH, SamplingDefaults, model_sizes
from rlhf.generator.registry import family_of_config
from rlhf.planner.sampling import GIB, PLACEMENTS, choose_plan, context_bytes, plan_sampling
from rlhf.planner.text_encoders import encoder_configs

RESULT = Path(__file__).parent / "results" / "small_card.json"
TINY_CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_ENCODER = {  # by the key of its layers: CLIP's, T5's
    "num_hidden_layers": TINY_CLIP | {"projection_dim": 16},
    "num_layers": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}
TINY_SAMPLING = SamplingDefaults(32, 48, 9, 3, 3.0, 8, 24)


def parse_small_card_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command's flags."""
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="folder of the model with random weights")
    parser.add_argument("--limit_gib", type=float, default=12.0, help="device memory (default: %(default)s)")
    parser.add_argument("--steps", type=int, nargs="+", default=[50], help="denoising steps (default: 50)")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", help="kind of device (default: what the machine has)")
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file, which is extended")
    return parser.parse_args(argv)


@torch.no_grad()
def build_folder(folder: Path, name: str, device: torch.device, divisor: int = 1) -> None:
    """Write a model of `SIZES` with random weights and nano's vocabularies, as published.

    divisor: of the numbers of layers of transformer and text encoders.
    """
    size, is_tiny, encoders, tokenizers = SIZES[name], "tiny" in name, {}, {}
    family = family_of_config({"_class_name": size.classes[0].__name__})
    for part, config in family.text_encoders.items():
        layers = "num_layers" if "num_layers" in config else "num_hidden_layers"
        config = config | (TINY_ENCODER[layers] if is_tiny else {layers: config[layers] // divisor})
        cls = family.classes.text_encoders[part]
        with torch.device(device):
            encoders[part] = cls(cls.config_class(**config)).to(size.dtype).to("cpu")
    for part, cls in family.classes.tokenizers.items():
        of_nano = "tokenizer_3" if cls is T5TokenizerFast else part
        tokenizers[part] = cls.from_pretrained(NANO_PATH / of_nano)
        if part != "tokenizer_3":  # whose length is a setting
            tokenizers[part].model_max_length = family.sizes["tokenizer"]["model_max_length"]
    if divisor > 1:
        layers = family.sizes["transformer"] | size.transformer
        size = replace(size, transformer=size.transformer | {"num_layers": layers["num_layers"] // divisor})
    parts = {"transformer": random_transformer(size, device), "vae": random_vae(size, device)}
    parts = {part: model.to("cpu") for part, model in parts.items()} | encoders | tokenizers
    pipe = family.classes.pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipe.sampling = TINY_SAMPLING if is_tiny else family.sampling
    pipe.save_pretrained(folder)


def measure(folder: Path, limit_gib: float, steps: int, device: torch.device) -> dict:
    """Sample one video within the limit; return memory and seconds."""
    model, card, is_cpu = str(folder), model_sizes(folder), device.type == "cpu"
    sampling = replace(SamplingDefaults(**card["sampling"]), num_inference_steps=steps)
    context = 0 if is_cpu else context_bytes(device)
    plans = plan_sampling(model, card, encoder_configs(model), sampling, context)
    # A CPU has no memory to save: the tiny form runs what 12 GiB choose of the full-size model.
    plan = next(p for p in plans if p.placement == PLACEMENTS[2]) if is_cpu else choose_plan(plans, limit_gib)
    if not is_cpu:
        allowed = (limit_gib * GIB - context) / total_memory(device)
        torch.get_device_module(device).set_per_process_memory_fraction(allowed)
    print(plan, flush=True)
    reset_peak_memory(device)
    start = time.perf_counter()
    sampler = Sampler(model, device, plan.placement)
    loaded, times = time.perf_counter(), []

    def note(done: int) -> None:
        synchronize(device)
        times.append(time.perf_counter())

    video = sampler.sample("a red fox trots through fresh snow", 0, sampling, note)
    end = time.perf_counter()
    free, total = (0, 0) if is_cpu else torch.get_device_module(device).mem_get_info()
    return {
        "limit_gib": limit_gib,
        "frames": len(video),
        "height": video.shape[2],
        "width": video.shape[3],
        "steps": steps,
        "placement": str(plan.placement),
        "predicted_gib": {name: size / GIB for name, size in plan.phases.items()},
        "context_gib": context / GIB,
        "peak_allocated_gib": peak_memory(device) / GIB,
        "driver_gib_at_end": (total - free) / GIB,  # with what the allocator keeps, and other processes
        "peak_host_gib": process_peak_memory() / GIB,
        "load_seconds": loaded - start,
        "encode_and_first_step_seconds": times[1] - times[0],
        "seconds_a_step": median(b - a for a, b in pairwise(times[1:])),
        "decode_seconds": end - times[-1],
        "total_seconds": end - start,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure each number of steps that the result file does not have yet."""
    args = parse_small_card_args(argv)
    device = pick_device(args.device)
    if not (args.folder / "model_index.json").is_file():
        build_folder(args.folder, args.size, device)
        if "tiny" not in args.size:
            return print(f"wrote {args.folder}; start again, so that host memory is that of sampling alone")
    about = environment(device) | {"size": args.size}
    key = lambda row: (row["limit_gib"], row["steps"])
    rows = read_rows(args.output, about, key)
    for steps in args.steps:
        if (args.limit_gib, steps) not in rows:
            row = measure(args.folder, args.limit_gib, steps, device)
            rows[key(row)] = row
            write_rows(args.output, about, rows.values())
        show_row(rows[args.limit_gib, steps])


if __name__ == "__main__":
    main()
