"""Text to video: `python demo.py` samples the embedded nano model and writes video.mp4.

`python demo.py --model_id ByteDance/ContentV-8B` samples the real model; set USE_ASCEND_NPU=1 on an
Ascend NPU. `--lora RUN/adapter` adds the adapter of a training run.
"""

import rlhf  # noqa: F401, I001 - it has to come before torch, see rlhf.plugins

import argparse
from dataclasses import fields, replace

import torch

from rewards.cli.flags import file_to_write
from rlhf.adapter.lora_file import read_lora
from rlhf.adapter.merge import apply_lora
from rlhf.checks import check_sampling
from rlhf.generator.files import CONTENTV_8B, SamplingDefaults, model_sizes
from rlhf.generator.loading import linear_sizes, load_pipeline
from rlhf.device import KNOWN_DEVICES, pick_device
from rlhf.run.video import to_uint8, write_video

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
        lora = args.lora and read_lora(args.lora, linear_sizes(model_sizes(args.model_id)["transformer"]))
        pipe = load_pipeline(args.model_id, device=pick_device(args.device))
        if lora:
            print(apply_lora(pipe.transformer, lora))
            if args.guidance_scale is None and lora.distilled:
                given["guidance_scale"] = 1.0
        sampling = replace(pipe.sampling, **given)
        generator = torch.Generator().manual_seed(args.seed)
        video = pipe(args.prompt, generator=generator, output_type="pt", **sampling.call_arguments()).frames[0]
    except ValueError as error:
        raise SystemExit(f"demo.py: error: {'; '.join(getattr(error, 'problems', [str(error)]))}") from error
    write_video(args.output, to_uint8(video.transpose(0, 1)), sampling.fps)
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
    parser.add_argument("--lora", help="adapter: a file, a folder such as RUN/adapter, or a hub id")
    for name, field in SAMPLING.items():
        parser.add_argument(f"--{name}", type=field.type, help="default: the checkpoint's recommendation")
    args = parser.parse_args(arguments)
    args.prompt = PROMPTS.get(args.model_id) if args.prompt is None else args.prompt  # an empty one is one
    if args.output.suffix not in VIDEOS:
        parser.error(f"argument --output: got {args.output.name!r}, expected {' or '.join(VIDEOS)}; correct it")
    if args.prompt is None:
        parser.error(f"--prompt: got none, expected one for {args.model_id}; add it")
    if args.negative_prompt is None:
        args.negative_prompt = NEGATIVE_PROMPTS.get(args.model_id)
    return args


if __name__ == "__main__":
    main()
