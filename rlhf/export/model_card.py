"""The model card of an export: README.md, as the Hugging Face Hub shows it.

It has the training settings, the result on held-out prompts, and the licences of base and rewards.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from rewards.catalogue import CATALOGUE
from rlhf.adapter.lora_weights import ADAPTER_FILE
from rlhf.evaluation.statistics import INTERVAL
from rlhf.generator.files import HUB_ID
from rlhf.generator.registry import ModelFamily, families
from rlhf.method.options import SCORES_ALONE
from rlhf.report import settings_rows
from rlhf.report.contact_sheet import CONTACT_SHEET
from rlhf.report.data import Run

TEMPLATE, PICTURE = "model_card.md.jinja", "before_after.png"
# Licences of base models, by the keys of a card's header.
LICENCES = {model: licence for family in families() for model, licence in family.licences.items()}
LICENCE_KEYS = ("license", "license_name", "license_link")
# Settings that every card shows, and those that none does: shown elsewhere, or of a machine.
ALWAYS_SHOWN = (
    *("method", "num_grad_steps", "learning_rate", "lora_rank"),
    *("per_device_train_batch_size", "max_steps", "seed"),
)
NEVER_SHOWN = (
    *("model", "prompts", "eval_prompts", "reward_funcs", "eval_reward_funcs", "reward_kwargs", "base_dir"),
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "device", "cpu_threads"),
    "initial_adapter",
)


@dataclass(frozen=True)
class Export:
    """An export. kind: "merged", or the convention of an adapter file, "diffusers" or "comfyui"."""

    run: Path
    kind: str
    scale: float = 1.0
    model: str | None = None  # base model (default: that of the run's config.yaml)
    step: int | None = None  # of a checkpoint; None for the result of a finished run
    distilled: bool = False  # sampled without guidance
    family: ModelFamily = field(default_factory=lambda: families()[0])


@dataclass(frozen=True)
class Base:
    """A base model: its name without the folder, and its licence by the keys of a card's header."""

    name: str
    header: dict[str, str]

    @property
    def licence(self) -> str:
        """Return the licence in words."""
        values = [self.header[key] for key in LICENCE_KEYS if self.header.get(key, "other") != "other"]
        return ", ".join(values) or "unknown: see the base model's own page"


def write_card(export: Export, out: Path) -> Path:
    """Write out/README.md and its picture, if the run has one; return the card's path."""
    import jinja2

    run = Run(export.run)
    base = resolve_base(export.model or run.config["model"])
    is_result, initial = export.step is None, _adapter_name(run.config.get("initial_adapter"))
    picture, rows = export.run / CONTACT_SHEET, run.result_rows() if is_result else []
    if is_result and picture.is_file():
        shutil.copyfile(picture, out / PICTURE)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    shown = [
        (name, value)
        for name, value, _, changed in settings_rows(run.config)
        if name in ALWAYS_SHOWN or (changed and name not in NEVER_SHOWN)
    ]
    licences = [_reward_licence_row(name, run.specs[name]) for name in run.reward_names]
    content = environment.get_template(TEMPLATE).render(
        card_data=header(base, export.kind, export.family).to_yaml(),
        family=export.family,
        base=base,
        merged=export.kind == "merged",
        convention=export.kind,
        trained=run.trained_names,
        way=_way(run.config.get("method"), " and ".join(run.trained_names) or "a reward"),
        steps=run.exported_step if is_result else export.step,
        is_result=is_result,
        initial=initial,
        scale=export.scale,
        rows=rows,
        interval_name=INTERVAL,
        count=next((row["prompts"] for row in rows if "prompts" in row), None),
        picture=PICTURE if is_result and picture.is_file() else None,
        prompt=repr(run.evaluations[0].prompts[0] if run.evaluations else "a red fox in the snow"),
        prompts=_file_name(run.config.get("anchor_data" if _is_offline(run.config) else "prompts")),
        eval_prompts=_file_name(run.config.get("eval_prompts")),
        machine=_machine(run),
        distilled=export.distilled,
        settings=shown,
        licences=[
            (f"base model, {base.name}", base.licence),
            *([(f"adapter that training began with, {initial}", "ask its author")] if initial else []),
            *licences,
        ],
    )
    ModelCard(content).save(out / "README.md")
    return out / "README.md"


def resolve_base(model: str) -> Base:
    """Return a base model's name and licence; for a folder, those in its model card."""
    if model in LICENCES:
        return Base(model, LICENCES[model])
    card = Path(model) / "README.md"
    if not card.is_file():
        is_hub_id = HUB_ID.fullmatch(model) and not Path(model).is_dir()
        return Base(model if is_hub_id else Path(model).name, {})
    data = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return Base(Path(model).name, {key: data[key] for key in LICENCE_KEYS if key in data})


def header(base: Base, kind: str, family: ModelFamily) -> ModelCardData:
    """Return the card's header: licence, library, task, tags, and the base model if on the Hub."""
    relation = "finetune" if kind == "merged" else "adapter"
    known = {"base_model": base.name, "base_model_relation": relation}
    known = base.header | (known if HUB_ID.fullmatch(base.name) else {})
    tags = ["text-to-video", "rlhf", family.name.lower()] + ["lora"] * (kind != "merged")
    # Not diffusers, whose snippet the Hub would show: its DiffusionPipeline does not know all
    # families.
    return ModelCardData(library_name="contentv-rlhf", pipeline_tag="text-to-video", tags=tags, **known)


def _way(method: str | None, rewards: str) -> str:
    """Return what trained the adapter."""
    if method in SCORES_ALONE:
        return f"by the scores of {rewards}, without their gradient"
    way = "the denoiser" if method == "prfl" else "the decoder and the denoiser"
    return f"by reward gradient: the gradient of {rewards} went back through {way}"


def _machine(run: Run) -> str:
    """Return device and duration of the run, "" where they were not recorded."""
    if not run.environment or "seconds" not in run.summary:
        return ""
    last = run.environment[-1]
    several = f"{last['processes']} x " if last["processes"] > 1 else ""
    return f"{run.summary['seconds']:.0f} s on {several}{last['device']}, evaluations included."


def _reward_licence_row(name: str, spec: str) -> tuple[str, str]:
    """Return the row of a reward in the table of licences."""
    if spec not in CATALOGUE:
        return f"reward `{name}`", "not built in: ask its author"
    entry = CATALOGUE[spec]
    return f"reward `{name}`", entry.licence if entry.weights else "no weights"


def _adapter_name(setting: str | None) -> str | None:
    """Return the name of the adapter in `initial_adapter`, without folders, which are private."""
    if not setting or (HUB_ID.fullmatch(setting) and not Path(setting).exists()):
        return setting
    parts = [part for part in Path(setting).parts if part not in ("adapter", ADAPTER_FILE)]
    return parts[-1]


def _is_offline(settings: dict) -> bool:
    """Return whether a run with these settings trained on the captions of its anchor_data."""
    return settings.get("method") == "srpo" and bool((settings.get("method_kwargs") or {}).get("offline"))


def _file_name(setting: str | None) -> str | None:
    """Return a prompt setting's file name without its folders, which are private."""
    return setting and Path(setting).name
