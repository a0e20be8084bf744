"""The guides: code blocks run, what is named exists, tables are those of the results."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from fences import NEEDS, PAGES, ROOT, Block, blocks, commands, python_words
from safetensors.torch import save_file
from scripts import script

from rlhf.config import GUIDANCE_GRADIENTS, METHODS, RewardGradientConfig, field_names
from rlhf.config.parse import parse_config
from rlhf.export import parse_export_args as parse_export
from rlhf.method.options import METHOD_OPTIONS
from rlhf.run.metrics import read_metrics

PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
LANGUAGES = {"python", "bash", "yaml", "toml", "text"}
MIGRATIONS = [page for page in PAGES if page.stem.startswith("migrate_")]
PROGRAMS = {".ci/run", "accelerate", "eval", "hf", "lint-imports", "mkdocs", "pip", "pytest"}
PROGRAMS |= {"python", "python3", "ruff", "source", "ulimit"}
METHOD_KWARGS = {name for kind in METHOD_OPTIONS.values() for name in kind.__dataclass_fields__}
NO_SETTINGS = {"enable_gradient_checkpointing", "set_attention_backend", "max_restarts", "nano_preference", "s_m"}
NO_SETTINGS |= {"vlm_question"}
NO_SETTINGS |= {"grad_norm", "memory_gib", "save_lora_weights", "npu_rms_norm", "no_grad", "comet_ml"}
OF_THE_COMMAND = {"memory_limit_gib", "plan_device", "plan_processes", "dry_run"}
SETTINGS = set(field_names())


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder that looks like a clone, in which what a block writes does not stay."""
    for name in ("docs", "configs", "eval", "bench", "tests", "demo.py", "train_rlhf.py", "rlhf", "rewards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


# -------------------------------------------------------------------------------------- what is run


@PAGE
def test_blocks_say_their_language_and_what_they_need(page):
    text = page.read_text()
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(blocks(page)), "a fence that is not understood"
    for block in blocks(page):
        assert block.language in LANGUAGES, f"line {block.line}"
        assert block.needs <= NEEDS, f"line {block.line}"
        assert set(block.marks) <= {"needs", "theirs", "file", "run", "said", "end"}, f"line {block.line}"


@PAGE
def test_blocks_run(page, sandbox, monkeypatch):
    """In order, the page's Python in one namespace, commands in this process."""
    namespace, found = {}, blocks(page)
    assert bool(found) == ("```" in page.read_text()), "nothing that is shown is passed over"
    for block in found:
        if name := block.marks.get("file"):
            (sandbox / name).write_text(block.code)
        if block.language == "python" and "theirs" not in block.marks:
            code = compile("\n" * block.line + block.code, str(page), "exec")
            if block.runs:
                exec(code, namespace)
        elif block.language == "bash" and block.runs:
            for command in commands(block.code):
                run(command, monkeypatch)


def run(command: list[str], monkeypatch) -> None:
    words = python_words(command)
    assert words, f"only Python is run here; say what the block needs: {command}"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        if words[0] == "-m":
            start = lambda: runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            start = lambda: runpy.run_path(words[0], run_name="__main__")
        status = None
        try:
            start()
        except SystemExit as ended:
            status = ended.code
    assert not status, command


def test_the_callback_of_the_guide_runs(tmp_path, monkeypatch):
    """The guide's own block with nano's smallest sizes."""
    (block,) = (block for block in blocks(ROOT / "docs" / "watching.md") if block.language == "python")
    monkeypatch.chdir(tmp_path)
    small = "num_frames=5, height=32, width=32, num_inference_steps=2, num_sample_prompts=0, num_diversity_prompts=0"
    small += ", report_to='none', cpu_threads=1"
    exec(block.code.replace("num_eval_prompts=2", f"num_eval_prompts=2, {small}"), {})
    rows = read_metrics(Path("runs/patient"))
    assert 0 < len(rows) <= 2
    assert all("eval/motion" in row for row in rows)


def of_language(language: str) -> list:
    """Every block of a language, as parameters; other projects' left out."""
    pairs = [(page, block) for page in PAGES for block in blocks(page) if block.language == language]
    return [pytest.param(b, id=f"{page.stem}:{b.line}") for page, b in pairs if "theirs" not in b.marks]


@pytest.mark.parametrize("block", of_language("yaml"))
def test_settings_that_are_shown_are_read(block: Block):
    given = yaml.safe_load(block.code)
    read = RewardGradientConfig(**given)
    others = {name: value for name, value in given.items() if not name.endswith("reward_funcs")}  # may be mappings
    assert {name: getattr(read, name) for name in others} == others


@pytest.mark.parametrize("block", of_language("toml"))
def test_toml_is_read(block: Block):
    assert tomllib.loads(block.code)


@pytest.mark.parametrize("block", of_language("bash"))
def test_commands_that_are_shown_are_understood(block: Block, sandbox):
    assert subprocess.run(["bash", "-n", "-c", block.code], capture_output=True).stderr == b""
    for run_folder in re.findall(r"\bruns/\w+", block.code):  # as a training run would have left it
        (sandbox / run_folder / "adapter").mkdir(parents=True, exist_ok=True)
        (sandbox / run_folder / "config.yaml").write_text("model: nano\n")
        save_file({}, sandbox / run_folder / "adapter" / "pytorch_lora_weights.safetensors")
    for command in commands(block.code):
        words = python_words(command)
        if words is None:
            assert command[0] in PROGRAMS or "=" in command[0], command
        elif words[0] == "-m":
            assert words[1] == "venv" or importlib.util.find_spec(words[1]), command
            if words[1] == "rlhf.export":
                parse_export(words[2:])
        else:
            understood(*words)


def understood(script: str, *arguments: str) -> None:
    assert Path(script).is_file(), script
    if script == "train_rlhf.py":
        parse_config([word for word in arguments if word != "..."], "configs/nano.yaml")
    elif script.startswith(("eval/", "demo.py")):
        runpy.run_path(script)[f"parse_{Path(script).stem}_args"](list(arguments))  # argparse would end the test


# ------------------------------------------------------------------------- what is named and linked


def headings(page: Path) -> set[str]:
    """The places of a page as links name them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in lines}


@PAGE
def test_links_lead_somewhere(page):
    for link, place in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / link if link else page
        assert target.exists(), link
        assert not place or place in headings(target), f"{link}#{place}"


@pytest.mark.parametrize("page", MIGRATIONS, ids=lambda page: page.stem)
def test_settings_of_a_migration_page_exist(page):
    rows = [re.split(r"(?<!\\)\|", row) for row in page.read_text().splitlines() if row.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)(?::[^`]*)?`", row[2])}
    assert len(named) > 10
    assert named <= {*SETTINGS, "train_dataset", "hps_v2"}


@PAGE
def test_settings_that_a_guide_names_exist(page):
    if page.name.startswith(("migrate_", "architecture", "evaluation", "reward", "generator", "CONTRIBUTING")):
        return  # which name others' settings, files, flags, rewards or attributes
    named = set(re.findall(r"`(?:--)?([a-z]+_[a-z_]+)(?:: [^`]*)?`", page.read_text()))
    known = {*SETTINGS, *METHODS, *METHOD_KWARGS, *OF_THE_COMMAND, *NO_SETTINGS}
    assert not {name for name in named - known if not name.startswith("on_")}


def test_every_method_and_guidance_mode_has_its_row():
    text = (ROOT / "docs" / "methods.md").read_text()
    for name in (*METHODS, *GUIDANCE_GRADIENTS):
        assert re.search(rf"^\| `{name}`", text, re.MULTILINE), name


@PAGE
def test_files_that_are_named_exist(page):
    for path in re.findall(r"`([\w.]+/[\w/.]+\.(?:py|yaml|md|json))`", page.read_text()):
        known = {"configs", "docs", "eval", "tests", "rlhf", "rewards", "bench"}
        assert path.split("/")[0] not in known or (ROOT / path).exists(), path


def test_recipes_of_the_guides_exist():
    for name in ("recipes", "contentv_8b", "troubleshooting", "performance"):
        text = (ROOT / "docs" / f"{name}.md").read_text()
        for recipe in re.findall(r"`(?:configs/)?((?:contentv_8b|nano)\w*\.yaml)`", text):
            assert (ROOT / "configs" / recipe).is_file(), recipe
    for path in (ROOT / "configs").glob("*.yaml"):
        text = (ROOT / "docs" / "recipes.md").read_text()
        family = re.sub(r"_\d_devices", "_2_devices", path.name)
        assert f"`{family}`" in text, f"{path.name} has no row in docs/recipes.md"


# ------------------------------------------------------------------------------------- what is made


def test_tables_are_those_of_the_results():
    tables = script("bench/tables.py")
    made = [page for page in tables.pages() if tables.PLACE.search(page.read_text())]
    assert {"README.md", "study.md", "step.md"} <= {page.name for page in made}
    for page in made:
        text = page.read_text()
        assert tables.fill(text) == text, f"{page.name}: run `python bench/tables.py`"
    page = (ROOT / "docs" / "methods.md").read_text()
    for study, name in tables.STUDIES.items():
        cells = re.findall(f"<!-- {study}: (.*?) -->", page)
        assert len(cells) >= 8
        rows = json.loads((ROOT / "bench" / "results" / name).read_text())["rows"]
        assert {row["arm"] for row in rows} >= set(cells)
    assert tables.fill_cells(page) == page, "run `python bench/tables.py`"


def test_the_file_tree_is_of_today_and_every_file_has_a_caption():
    tree = script("docs/file_tree.py")
    text = tree.PAGE.read_text()
    assert tree.drawn(text) == text, "run `python docs/file_tree.py`"
    assert not re.findall(r"^ *\w+(?:\.py|/)$", tree.tree(), re.MULTILINE), "a docstring is missing"


# ----------------------------------------------------------------------------------------- the site


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r": (\w+\.md)$", text, re.MULTILINE))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def test_the_tables_of_settings_are_those_of_the_code():
    hooks = script("docs/site_hooks.py")
    assert re.findall(r"^\| `(\w+)` \| ", hooks.settings_tables(), re.MULTILINE) == field_names()
    assert "| draft_lv: `num_draws` | a whole number, at least 1 | `2` | " in hooks.options_table()
    made = hooks.on_page_markdown((ROOT / "docs" / "settings.md").read_text())
    assert hooks.settings_tables() in made
    assert hooks.options_table() in made
    assert "| `lora_rank` | a whole number, at least 1, at most 4096 | `16` | Rank r of" in made
    assert hooks.on_page_markdown("other") == "other"


def test_a_setting_is_in_a_recipe_or_a_row_says_when_to_change_it():
    table = (ROOT / "docs" / "settings.md").read_text().split("| setting | when to change it |")[1].split("<!--")[0]
    told = re.findall(r"^\| `(\w+)` \| \w.*\. \|$", table, re.MULTILINE)
    recipes = {key for path in (ROOT / "configs").glob("*.yaml") for key in yaml.safe_load(path.read_text())}
    assert told == [name for name in field_names() if name not in recipes]


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="mkdocs is not installed: pip install -e '.[docs]'")
def test_the_site_builds_and_no_link_is_dead(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "api" / "index.html").is_file()
    assert (tmp_path / "site" / "results" / "study_long_trials.json").is_file()
    assert 'href="../results/study/"' in (tmp_path / "site" / "study" / "index.html").read_text()
