"""The scripts of bench/ find this clone's packages, not the rewards.py beside them."""

import ast

import pytest
from scripts import ROOT

SCRIPTS = [path for path in sorted((ROOT / "bench").glob("*.py")) if "__main__" in path.read_text()]
OWN = {"rlhf", "rewards"} | {path.stem for path in (ROOT / "bench").glob("*.py")}
FIRST = "sys.path.insert(0, str(Path(__file__).parents[2]))"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_the_clone_comes_before_the_folder_of_the_script(path):
    before = []
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        if OWN & {name.split(".")[0] for name in names}:
            assert FIRST in before, f"line {node.lineno}"
            return
        before.append(ast.unparse(node))
    assert len(SCRIPTS) > 10
