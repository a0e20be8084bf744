"""Text to video: `python demo.py` samples the embedded nano model and writes video.mp4.

`python demo.py --model_id ByteDance/ContentV-8B` samples the real model; set USE_ASCEND_NPU=1 on an
Ascend NPU. `--lora RUN/adapter` adds the adapter of a training run. `--memory_limit_gib 12` keeps
parts of the model in host memory. `--serve` opens a page with base and tuned side by side.
"""

import rlhf  # noqa: F401, I001 - it has to come before torch, see rlhf.plugins

import argparse
from dataclasses import asdict, fields
from pathlib import Path

from rewards.cli.flags import file_to_write
from rlhf.adapter.lora_file import read_lora_for
from rlhf.adapter.merge import check_lora_scale
from rlhf.checks import check_sampling
from rlhf.generator.files import SamplingDefaults, model_sizes
from rlhf.generator.registry import CONTENTV_8B
from rlhf.device import KNOWN_DEVICES, pick_device
from rlhf.evaluation.sampler import Sampler
from rlhf.page.server import add_address_flags
from rlhf.page.studio import serve_studio
from rlhf.planner.sampling import fit_sampling
from rlhf.run.metrics import progress_bar
from rlhf.run.video import write_video

SAMPLING = {field.name: field for field in fields(SamplingDefaults)}
VIDEOS = (".mp4", ".mov", ".mkv", ".avi")
PROMPTS = {
    "nano": "a large red circle moving left on a white background",
    CONTENTV_8B: "A young musician sits on a rustic wooden stool in a cozy, dimly lit room, strumming "
    "an acoustic guitar with a worn, sunburst finish.",
}
NEGATIVE_PROMPTS = {
    CONTENTV_8B: "overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, bad "
    "eyes, bad limbs, distortion",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit with a message on an error."""
    args = parse_demo_args(arguments)
    given = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    try:
        check_sampling(args.model_id, given, args.seed, args.device)
        check_lora_scale(args.scale)
        if args.scale != 1 and not args.lora:
            raise ValueError(f"--scale: got {args.scale:g} without --lora, expected an adapter to scale; name one")
        card = model_sizes(args.model_id)
        loras = [read_lora_for(card["transformer"], name) for name in args.lora]
        if loras and not args.serve and args.guidance_scale is None and loras[0].distilled:
            given["guidance_scale"] = 1.0
        sampling, device = SamplingDefaults(**card["sampling"] | given), pick_device(args.device)
        plan = fit_sampling(args.model_id, card, sampling, device, args.memory_limit_gib)
        if plan:
            print(f"{args.memory_limit_gib:g} GiB: {plan}", flush=True)
        if args.serve:
            form = {name: getattr(args, name) for name in ("prompt", "seed", "scale")} | asdict(sampling)
            check = lambda asked: fit_sampling(args.model_id, card, asked, device, args.memory_limit_gib, plan)
            load = lambda: Sampler(args.model_id, device, plan and plan.placement)
            return serve_studio(load, args.model_id, args.lora, form, args.serve, check, args.host, args.port)
        sampler = Sampler(args.model_id, device, plan and plan.placement)
        if loras:
            print(sampler.use(loras[0], args.scale))
        with progress_bar("sample", "step", sampling.num_inference_steps, shown=True) as bar:
            video = sampler.sample(args.prompt, args.seed, sampling, lambda done: bar.update(done - bar.n))
    except ValueError as error:
        raise SystemExit(f"demo.py: error: {'; '.join(getattr(error, 'problems', [str(error)]))}") from error
    write_video(args.output, video.transpose(0, 1), sampling.fps)
    size = f"{len(video)} frames of {sampling.width}x{sampling.height}"
    print(f"wrote {args.output}: {size} at {sampling.fps} fps")


def parse_demo_args(arguments: list[str] | None) -> argparse.Namespace:
    """Return the command's flags."""
    parser = argparse.ArgumentParser(description="Sample a video from a prompt.")
    parser.add_argument("--model_id", default="nano", help="nano, a folder, or a hub id (default: %(default)s)")
    parser.add_argument("--prompt", help="text prompt (default: an example for nano and ContentV-8B)")
    parser.add_argument(
        "--output", type=file_to_write, default="video.mp4", help="file to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of the initial noise (default: %(default)s)")
    parser.add_argument("--device", help=f"{', '.join(KNOWN_DEVICES)} (default: what the machine has)")
    adapter = "adapter: a file, a folder such as RUN/adapter, or a hub id; --serve offers several"
    parser.add_argument("--lora", nargs="+", default=[], help=adapter)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the adapter (default: %(default)s)")
    limit = "keep parts of the model in host memory, so that so much of an accelerator is enough"
    parser.add_argument("--memory_limit_gib", type=float, help=limit)
    page = "serve a page; FOLDER keeps its videos and votes.json (default: %(const)s)"
    parser.add_argument("--serve", type=Path, nargs="?", const="demo_page", metavar="FOLDER", help=page)
    add_address_flags(parser)
    for name, field in SAMPLING.items():
        parser.add_argument(f"--{name}", type=field.type, help="default: the checkpoint's recommendation")
    args = parser.parse_args(arguments)
    args.prompt = PROMPTS.get(args.model_id) if args.prompt is None else args.prompt  # an empty one is one
    if args.output.suffix not in VIDEOS:
        parser.error(f"argument --output: got {args.output.name!r}, expected {' or '.join(VIDEOS)}; correct it")
    if len(args.lora) > 1 and not args.serve:
        parser.error(f"argument --lora: got {len(args.lora)}, expected one; leave the others out, or add --serve")
    if args.prompt is None and not args.serve:
        parser.error(f"--prompt: got none, expected one for {args.model_id}; add it")
    if args.negative_prompt is None:
        args.negative_prompt = NEGATIVE_PROMPTS.get(args.model_id)
    return args


if __name__ == "__main__":
    main()
