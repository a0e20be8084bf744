"""Videos of a model for prompts and seeds, the same noise for every model:

    accelerate launch eval/generate.py --from_run runs/nano --base --output videos/base      the model that was trained
    accelerate launch eval/generate.py --from_run runs/nano --output videos/tuned            with the run's adapter
    python eval/generate.py --from_run runs/nano --scale 0.5 --output videos/half            with half of it
    python eval/generate.py --model exported/nano --prompts my.txt --output videos/mine

Writes OUTPUT/0000-seed0.mp4 and so on, and OUTPUT/videos.jsonl, which says what each shows. Started again it goes on.
"""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

from rlhf.checks import check_config
from rlhf.config import RewardGradientConfig, is_distilled
from rlhf.contentv.files import SamplingDefaults, model_sizes
from rlhf.prompts import load_prompts
from rlhf.run_folder import settings_in
from rlhf.video_set import Video, together, write_manifest

SAMPLING = [field.name for field in fields(SamplingDefaults)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval/generate.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the videos")
    parser.add_argument("--prompts", help="a file, as the setting takes it, or a built-in set (default: nano_held_out)")
    parser.add_argument("--num_prompts", type=int, help="the leading ones only; a built-in set draws so many")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of the noise: a video of each prompt for each"
    )
    add_model_flags(parser)
    args = parser.parse_args(argv)
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"--num_prompts: got {args.num_prompts}, expected at least 1; raise it")
    fill_from_run(args)
    return args


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What makes the videos, and how: shared with eval/vbench.py."""
    parser.add_argument(
        "--from_run", type=Path, help="a training run: its model, adapter, held-out prompts and sampling"
    )
    parser.add_argument("--base", action="store_true", help="with --from_run: leave its adapter out")
    parser.add_argument("--model", help="nano (default), a folder, or a hub id")
    parser.add_argument("--lora", type=Path, help="folder of an adapter, such as RUN/adapter")
    parser.add_argument("--merge", action="store_true", help="add the adapter to the weights first, as an export does")
    parser.add_argument("--scale", type=float, default=1.0, help="how often the adapter counts (default: 1)")
    parser.add_argument("--batch_size", type=int, default=8, help="videos made at a time on a device (default: 8)")
    parser.add_argument("--device", help="kind of device; by default what the machine has")
    for field in fields(SamplingDefaults):
        parser.add_argument(
            f"--{field.name}", type=field.type, help="by default the run's, or what the model recommends"
        )


def fill_from_run(args: argparse.Namespace) -> None:
    """Set what was not given to what the run says."""
    args.base_dir, args.prompt_seed, run = None, 0, {}
    if args.from_run is not None:
        if not (run := settings_in(args.from_run)):
            got = f"{args.from_run / 'config.yaml'}: got no file there"
            raise ValueError(f"{got}, expected the folder of a training run; correct --from_run")
        args.lora = None if args.base else args.lora or args.from_run / "adapter"
    elif args.base:
        raise ValueError(
            "--base: got no --from_run, expected the run whose adapter is left out; name it, or drop --base"
        )
    if args.lora and is_distilled(settings_in(args.lora.parent) or run):
        run["guidance_scale"] = 1.0  # twice would be too much
    args.model = args.model or run.get("model", "nano")
    for name in SAMPLING:
        setattr(args, name, run.get(name) if getattr(args, name) is None else getattr(args, name))
    if getattr(args, "prompts", "") is None:
        args.prompts, args.base_dir = run.get("eval_prompts") or "nano_held_out", run.get("base_dir")
        args.num_prompts, args.prompt_seed = args.num_prompts or run.get("num_eval_prompts"), run.get("eval_seed", 0)


def checked_sampling(args: argparse.Namespace, prompts: str) -> SamplingDefaults:
    """How to sample, after everything that can be wrong was looked at. Raises ValueError; loads no weights."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    sampling = replace(SamplingDefaults(**model_sizes(args.model)["sampling"]), **given)
    settings = {name: getattr(sampling, name) for name in SAMPLING if name != "fps"}
    check_config(
        RewardGradientConfig(
            model=args.model,
            eval_prompts=prompts,
            base_dir=args.base_dir,
            device=args.device,
            output_dir=str(args.output),
            per_device_eval_batch_size=args.batch_size,
            report_to=[],
            **settings,
        )
    )
    return sampling


def jobs(folder: Path, prompts: list[str], seeds: list[int]) -> list[Video]:
    """A video of each prompt for each seed."""
    return [Video(folder / f"{i:04d}-seed{s}.mp4", prompt, s) for i, prompt in enumerate(prompts) for s in seeds]


def make(args: argparse.Namespace, sampling: SamplingDefaults, videos: list[Video], listed: bool = True) -> None:
    """Make the videos, on all processes; listed: write videos.jsonl beside them."""
    from rlhf.generate import Variant, check_settings, generate, write_settings
    from rlhf.parallel import make_accelerator

    variant = Variant(args.model, args.lora, args.merge, args.scale)
    variant.check()
    check_settings(args.output, variant, sampling)
    whole = together(args.output, videos) if listed else []
    accelerator = make_accelerator(RewardGradientConfig(device=args.device, output_dir=str(args.output), report_to=[]))
    if accelerator.is_main_process:
        args.output.mkdir(parents=True, exist_ok=True)
        write_settings(args.output, variant, sampling)
        if listed:
            write_manifest(args.output, whole)
    generate(variant, videos, sampling, accelerator, args.batch_size)
    if accelerator.is_main_process:
        print(f"{len(videos)} videos in {args.output}")
    accelerator.end_training()


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    try:
        args = parse(argv)
        sampling = checked_sampling(args, args.prompts)
        drawn = load_prompts(args.prompts, args.base_dir, args.num_prompts or 64, args.prompt_seed)
        prompts = list(dict.fromkeys(drawn[: args.num_prompts]))  # a built-in set may draw one again
        make(args, sampling, jobs(args.output, prompts, args.seeds))
    except (ValueError, OSError) as error:  # ConfigError is the first
        print(f"eval/generate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
