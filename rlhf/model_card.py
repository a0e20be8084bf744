"""The model card of an export: README.md, as the Hugging Face Hub shows it.

It says what the export is, what it was trained on, whether it got better, and the licences of what it was made with.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from rewards.catalogue import CATALOGUE
from rlhf import report
from rlhf.config import is_distilled
from rlhf.contentv.files import CONTENTV_8B, HUB_ID
from rlhf.report.data import Run

TEMPLATE, PICTURE = "model_card.md.jinja", "before_after.png"
# Of base models, by the keys of a card's header; that of ContentV-8B as NOTICE says.
LICENCES = {
    "nano": {"license": "apache-2.0"},
    CONTENTV_8B: {
        "license": "other",
        "license_name": "stabilityai-ai-community",
        "license_link": "https://stability.ai/community-license-agreement",
    },
}
LICENCE_KEYS = ("license", "license_name", "license_link")
# Settings that a card gives whatever they are, and those that tell of the machine it was made on, or stand elsewhere.
ALWAYS = ("method", "num_grad_steps", "learning_rate", "lora_rank", "per_device_train_batch_size", "max_steps", "seed")
NEVER = (
    *("model", "prompts", "eval_prompts", "reward_funcs", "eval_reward_funcs", "reward_kwargs", "base_dir"),
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "device", "cpu_threads"),
)


@dataclass(frozen=True)
class Export:
    """What the card is about. kind: "merged", or the convention of an adapter's file, "diffusers" or "comfyui"."""

    run: Path
    kind: str
    scale: float = 1.0
    model: str | None = None  # the base, where it is not the one of the run's config.yaml


@dataclass(frozen=True)
class Base:
    """A base model: its name without the place where it lies, and its licence by the keys of a card's header."""

    name: str
    header: dict[str, str]

    @property
    def licence(self) -> str:
        """The licence in words."""
        told = [self.header[key] for key in LICENCE_KEYS if self.header.get(key, "other") != "other"]
        return ", ".join(told) or "not known here: see where it comes from"


def write_card(export: Export, out: Path) -> Path:
    """Write out/README.md and the picture in it, if the run left one; return the card's path."""
    import jinja2

    run, base = Run(export.run), base_of(export.model or Run(export.run).config["model"])
    picture, rows = export.run / "contact_sheet.png", run.headline()
    if picture.is_file():
        shutil.copyfile(picture, out / PICTURE)
    loader = jinja2.FileSystemLoader(Path(report.__file__).parent)
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    content = environment.get_template(TEMPLATE).render(
        card_data=header(base, export.kind).to_yaml(),
        base=base,
        merged=export.kind == "merged",
        convention=export.kind,
        trained=run.trained,
        steps=run.steps if run.result_step is None else run.result_step,
        scale=export.scale,
        rows=rows,
        count=next((row["prompts"] for row in rows if "prompts" in row), None),
        picture=PICTURE if picture.is_file() else None,
        prompt=repr(run.evaluations[0].prompts[0] if run.evaluations else "a red fox in the snow"),  # as Python has it
        prompts=_file_name(run.config.get("prompts")),
        eval_prompts=_file_name(run.config.get("eval_prompts")),
        machine=_machine(run),
        alone=is_distilled(run.config),
        settings=[(name, value) for name, value, _, changed in report.settings(run.config) if _is_told(name, changed)],
        licences=[(f"base model, {base.name}", base.licence), *map(_of_reward, run.judges)],
    )
    ModelCard(content).save(out / "README.md")
    return out / "README.md"


def base_of(model: str) -> Base:
    """What is known of the model that a setting names: of a folder, what its own card says."""
    if model in LICENCES:
        return Base(model, LICENCES[model])
    card = Path(model) / "README.md"
    if not card.is_file():
        return Base(model if HUB_ID.fullmatch(model) and not Path(model).is_dir() else Path(model).name, {})
    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return Base(Path(model).name, {key: data[key] for key in LICENCE_KEYS if key in data})


def header(base: Base, kind: str) -> ModelCardData:
    """What the Hub reads: licence, library, task, tags, and the base model if it is on the Hub."""
    relation = "finetune" if kind == "merged" else "adapter"
    known = {"base_model": base.name, "base_model_relation": relation} if HUB_ID.fullmatch(base.name) else {}
    tags = ["text-to-video", "rlhf", "reward-gradient", "contentv"] + ["lora"] * (kind != "merged")
    return ModelCardData(library_name="diffusers", pipeline_tag="text-to-video", tags=tags, **base.header, **known)


def _is_told(name: str, changed: bool) -> bool:
    return name in ALWAYS or (changed and name not in NEVER)


def _machine(run: Run) -> str:
    """What it ran on and for how long, as far as the run says."""
    if not run.environment or "seconds" not in run.summary:
        return ""
    last = run.environment[-1]
    several = f"{last['processes']} x " if last["processes"] > 1 else ""
    return f"{run.summary['seconds']:.0f} s on {several}{last['device']}, evaluations included."


def _of_reward(name: str) -> tuple[str, str]:
    """The row of a reward in the table of licences."""
    if name not in CATALOGUE:
        return f"reward `{name}`", "not built in: ask its author"
    entry = CATALOGUE[name]
    return f"reward `{name}`", entry.licence if entry.weights else "no weights"


def _file_name(setting: str | None) -> str | None:
    """A prompt set by name: of a file without the folders above it, which are nobody's business."""
    return setting and Path(setting).name
