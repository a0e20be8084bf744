"""Make videos of a model for prompts and seeds, from the same noise for every model.

    python eval/generate.py --from_run runs/nano --base --output videos/base        the base model
    python eval/generate.py --from_run runs/nano --output videos/tuned              with adapter
    python eval/generate.py --from_run runs/nano --scale 0.5 --output videos/half   scaled by 0.5
    python eval/generate.py --model exported/nano --prompts my.txt --output videos/mine

Writes OUTPUT/0000-seed0.mp4 and so on, with their prompts in OUTPUT/videos.jsonl. A second start
resumes. With `accelerate launch` all devices share the work.
"""

import argparse
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

from rlhf.checks import check_config
from rlhf.config import RewardGradientConfig
from rlhf.evaluation.video_set import Video, merge_manifest, write_manifest
from rlhf.generator.files import SamplingDefaults, model_sizes
from rlhf.prompts import load_prompts
from rlhf.run.folder import read_settings
from rlhf.types import row_of

SAMPLING = [field.name for field in fields(SamplingDefaults)]


def parse_generate_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command's flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval/generate.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the videos")
    parser.add_argument("--prompts", help="prompt file or built-in set (default: the run's, or nano_held_out)")
    parser.add_argument("--num_prompts", type=int, help="number of prompts: the first of a file, or drawn from a set")
    seeds = "seeds of the noise; each prompt gets a video for each seed (default: 0)"
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help=seeds)
    add_model_flags(parser)
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"--num_prompts: got {args.num_prompts}, expected at least 1; raise it")
    fill_from_run(args)
    return args


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of model and sampling, which eval/vbench.py has, too."""
    from_run = "take model, adapter, held-out prompts and sampling from this training run, or from its checkpoint"
    parser.add_argument("--from_run", type=Path, help=from_run)
    parser.add_argument("--base", action="store_true", help="with --from_run: leave its adapter out")
    parser.add_argument("--model", help="nano (default), a folder, or a hub id")
    parser.add_argument("--lora", type=Path, help="adapter: a file, or a folder such as RUN/adapter")
    parser.add_argument("--merge", action="store_true", help="add the adapter to the weights first, as an export does")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the adapter (default: 1)")
    parser.add_argument("--batch_size", type=int, default=8, help="videos at a time on a device (default: 8)")
    parser.add_argument("--device", help="kind of device (default: what the machine has)")
    for field in fields(SamplingDefaults):
        sampling = "default: the run's value, or the model's recommendation"
        parser.add_argument(f"--{field.name}", type=field.type, help=sampling)


def fill_from_run(args: argparse.Namespace) -> None:
    """Fill the flags that were not given from the run."""
    args.base_dir, args.prompt_seed, args.origin, run = None, 0, "", {}
    if args.from_run is not None:
        from rlhf.export.trained import find_run, find_trained  # takes seconds to import

        folder, _ = find_run(args.from_run)
        run, started = read_settings(folder), folder / "initial_adapter"  # part of what the run calls its base
        run |= run.get("eval_size") or {}  # the size at which the run itself was judged
        if args.base:
            args.lora = started if started.is_dir() else None
        elif not args.lora:
            trained = find_trained(args.from_run)
            args.lora, args.origin = trained.adapter, f"sampling with {trained.origin}"
    elif args.base:
        expected = "expected the run whose adapter is left out"
        raise ValueError(f"--base: got no --from_run, {expected}; name it, or drop --base")
    if args.lora:
        from rlhf.adapter.lora_file import is_distilled_adapter  # takes seconds to import

        with suppress(ValueError):  # of an absent one, which is told with what is wrong with the sampling
            if is_distilled_adapter(args.lora):
                run["guidance_scale"] = 1.0  # the adapter has learned guidance
    args.model = args.model or run.get("model", "nano")
    for name in SAMPLING:
        setattr(args, name, run.get(name) if getattr(args, name) is None else getattr(args, name))
    if getattr(args, "prompts", "") is None:
        args.prompts, args.base_dir = run.get("eval_prompts") or "nano_held_out", run.get("base_dir")
        args.num_prompts = args.num_prompts or run.get("num_eval_prompts")
        args.prompt_seed = run.get("eval_seed", 0)


def checked_sampling(args: argparse.Namespace, prompts: str) -> SamplingDefaults:
    """Return the sampling settings, after checks of all flags without weights; raise ValueError."""
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
            num_eval_prompts=getattr(args, "num_prompts", None) or 64,
            report_to=[],
            **settings,
        )
    )
    return sampling


def planned_videos(folder: Path, prompts: list[str], seeds: list[int]) -> list[Video]:
    """Return the videos to make: one of each prompt for each seed."""
    numbered = [(i, prompt, seed) for i, prompt in enumerate(prompts) for seed in seeds]
    where = lambda i, seed: folder / f"{i:04d}-seed{seed}.mp4"
    return [Video(where(i, seed), prompt, seed, row_of(prompt).get("category")) for i, prompt, seed in numbered]


def make_videos(
    args: argparse.Namespace, sampling: SamplingDefaults, videos: list[Video], manifest: bool = True
) -> None:
    """Make the videos on all processes; manifest: also write videos.jsonl."""
    from rlhf.distributed.accelerator import make_accelerator
    from rlhf.evaluation.generate import Variant, check_settings, generate, write_settings

    variant = Variant(args.model, args.lora, args.merge, args.scale)
    variant.check()
    check_settings(args.output, variant, sampling, videos)
    listed = merge_manifest(args.output, videos) if manifest else []
    config = RewardGradientConfig(device=args.device, output_dir=str(args.output), report_to=[])
    accelerator = make_accelerator(config)
    if accelerator.is_main_process:
        print(args.origin, end="\n" if args.origin else "")
        args.output.mkdir(parents=True, exist_ok=True)
        write_settings(args.output, variant, sampling)
        if manifest:
            write_manifest(args.output, listed)
    generate(variant, videos, sampling, accelerator, args.batch_size)
    if accelerator.is_main_process:
        print(f"{len(videos)} videos in {args.output}")
    accelerator.end_training()


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    try:
        args = parse_generate_args(argv)
        sampling = checked_sampling(args, args.prompts)
        drawn = load_prompts(args.prompts, args.base_dir, args.num_prompts or 64, args.prompt_seed)
        rows = {repr(row_of(prompt)): prompt for prompt in drawn[: args.num_prompts]}  # one may be drawn twice
        prompts = list(rows.values())
        make_videos(args, sampling, planned_videos(args.output, prompts, args.seeds))
    except (ValueError, OSError) as error:  # ConfigError is a ValueError
        print(f"eval/generate.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
