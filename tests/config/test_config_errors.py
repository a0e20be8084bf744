"""Each mistake of `config_mistakes` is answered with got, expected and cure; none lacks a row.

The lines that report a problem are read from the syntax trees of the checks, and those that a row
reaches are traced: a new error in these files needs a row there.
"""

import ast
import functools
import importlib.util
import json
import os
import sys
import threading
from pathlib import Path

import pytest
import yaml
from checkpoints import write_manifest
from config_mistakes import GOOD, ROWS, Row

from rlhf.checks import check_config
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.config.parse import parse_config

PACKAGE = Path(__file__).parents[2] / "rlhf"
CHECKED = [path for room in ("checks", "config") for path in (PACKAGE / room).glob("*.py")]
CHECKED += [PACKAGE / "method" / "options.py", PACKAGE / "prompts" / "__init__.py"]
# Tested beside what they are of: in prompts/test_prompts, export/test_demo, training/test_initial_adapter, test_config.
OTHERS = ("as_prompts", "check_sampling", "read_initial", "_explain_keywords", "explained")


# ---------------------------------------------------------------------------------- making mistakes


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Make the folder that rows call {tmp}: an empty file, half a model, a reward, some runs."""
    tmp = tmp_path_factory.mktemp("project")
    (tmp / "empty.txt").write_text("# nothing\n")
    (tmp / "latin.txt").write_text("zwölf", encoding="latin-1")
    (tmp / "broken.jsonl").write_text('{"prompt": "a cat"}\na dog\n')
    (tmp / "text.jsonl").write_text('{"text": "a cat"}\n')
    (tmp / "half" / "vae").mkdir(parents=True)
    (tmp / "run" / "adapter").mkdir(parents=True)
    (tmp / "run" / "config.yaml").touch()
    (tmp / "locked").mkdir()
    (tmp / "judge.py").write_text("def motion(video, prompts, **info): ...\n")
    for run in ("run/checkpoints/step-3", "another/checkpoints/step-3", "longer/checkpoints/step-3"):
        (tmp / run).mkdir(parents=True)
    (tmp / "longer/checkpoints/step-5").mkdir()
    (tmp / "unreadable/checkpoints/step-3").mkdir(parents=True)
    guard = {"best_step": 2, "best_gain": 1.0, "worse": 0}
    state = {"step": 3, "optimizer_updates": 3, "settings": vars(RewardGradientConfig(**GOOD)), "guard": guard}
    for step in tmp.glob("*/checkpoints/step-*"):
        (step / "state.json").write_text("{}" if "unreadable" in step.parts else json.dumps(state))
        write_manifest(step)
    (tmp / "spoilt/checkpoints/step-3").mkdir(parents=True)
    (tmp / "linked").mkdir()
    (tmp / "linked" / "checkpoints").symlink_to(tmp / "run" / "checkpoints")
    (tmp / "mixed" / "summary.json").mkdir(parents=True)
    (tmp / "mixed" / "samples").touch()
    (tmp / "busy").mkdir()
    (tmp / "busy" / "run.lock").write_text('{"host": "another", "pid": 7, "started": "1"}')
    return tmp


def told(mistake, project: Path, monkeypatch) -> list[str]:
    """Return what the command says of a mistake."""
    monkeypatch.chdir(project)
    here = importlib.util.find_spec
    absent = lambda name, *package: None if name in ("bitsandbytes", "clearml") else here(name, *package)
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    may = os.access  # of root, who may everything
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and may(path, mode))
    path = project / "config.yaml"
    settings = GOOD | {"output_dir": "{tmp}/new"} | (mistake if isinstance(mistake, dict) else {})
    text = mistake if isinstance(mistake, str) else yaml.safe_dump(settings)
    path.write_text(text.replace("{tmp}", str(project)))
    flags = [flag.replace("{tmp}", str(project)) for flag in mistake] if isinstance(mistake, list) else []
    try:
        check_config(parse_config(flags if "--config" in flags else ["--config", str(path), *flags]))
    except ConfigError as error:
        return error.problems
    return []


def name_of(row: Row) -> str:
    return " ".join(row.mistake if isinstance(row.mistake, list | dict) else [row.mistake.split("\n")[0]])


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_a_mistake_is_answered_with_what_was_got_what_was_expected_and_the_cure(row, project, monkeypatch):
    problems = told(row.mistake, project, monkeypatch)
    got, expected, cure = row.told.replace("{tmp}", str(project)).split(" ... ")
    answers = [p for p in problems if got in p and expected in p and cure in p]
    assert len(answers) == 1, problems
    for problem in problems:
        assert len(problem) < 800, "one paragraph"
        assert "\n" not in problem
        assert "Traceback" not in problem


def test_without_a_mistake_nothing_is_said(project, monkeypatch):
    assert told({}, project, monkeypatch) == []


# --------------------------------------------------------------------------- no error without a row


def says_something(node: ast.AST) -> bool:
    """Whether a node of a syntax tree raises, yields or collects a problem."""
    match node:
        case ast.Raise() | ast.Yield():
            return True
        case ast.Return(value=ast.List(elts=[ast.JoinedStr(), *_])):
            return True
        case ast.Call(func=ast.Attribute(attr="append", value=ast.Name(id="problems"))):
            return True
    return False


@functools.cache
def places() -> dict[tuple[str, int], str]:
    """(file, line) -> file.function:line, for each line of a statement that says something."""
    found = {}
    for path in CHECKED:
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or function.name in OTHERS:
                continue
            for node in filter(says_something, ast.walk(function)):
                for line in range(node.lineno, node.end_lineno + 1):
                    found[str(path), line] = f"{path.parent.name}/{path.stem}.{function.name}:{node.lineno}"
    return found


def test_every_error_of_the_checks_has_a_row(project, monkeypatch):
    wanted, reached = places(), set()
    assert len(set(wanted.values())) > 55

    @functools.cache
    def has_one(code) -> bool:
        return any((code.co_filename, line) in wanted for _, _, line in code.co_lines())

    def trace(frame, event, _):
        if not has_one(frame.f_code):
            return None
        if event == "line" and (place := wanted.get((frame.f_code.co_filename, frame.f_lineno))):
            reached.add(place)
        return trace

    before = sys.gettrace()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        for row in ROWS:
            with monkeypatch.context() as patch:
                told(row.mistake, project, patch)
    finally:
        sys.settrace(before)
        threading.settrace(None)
    assert set(wanted.values()) - reached == set(), "errors without a row in this table"
