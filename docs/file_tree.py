"""Write the tree of source files into docs/architecture.md: `python docs/file_tree.py`.

A file's caption is the first sentence of its docstring. A folder's caption is that of its
`__init__.py`.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("rlhf", "rewards", "eval", "bench")
SCRIPTS = ("train_rlhf.py", "demo.py")
CAPTIONS = {  # of folders that are no packages
    "eval": "Commands that generate, score and compare videos of any model",
    "bench": "Measurements of speed, memory and methods; their numbers in results/",
    "bench/nano": "Training of ContentV-nano and its judges from nothing",
    "configs": "Recipes, prompt sets, and launch files of accelerate",
    "docs": "The guides; mkdocs.yml makes a site of them",
    "tests": "Tests, in the same rooms as the source; what they share in helpers/",
}
PLACE = re.compile(r"(<!-- file tree -->\n).*?(<!-- end of file tree -->)", re.DOTALL)
COLUMN, LONGEST = 28, 105  # where captions begin, and their length


def caption(path: Path) -> str:
    """Return the first sentence of a module's docstring on one line, shortened to LONGEST.

    Return "" without a docstring.
    """
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.exists() else None
    sentence = re.split(r"(?<=[.?])\s", " ".join((text or "").split("\n\n")[0].split()))[0].rstrip(".")
    if len(sentence) > LONGEST:
        shorter = re.match(rf"(.{{20,{LONGEST}}})(?:[:;]| - )", sentence)
        return shorter[1] if shorter else sentence
    return sentence


def lines_of(folder: Path, depth: int = 0) -> list[str]:
    """Return a line for a folder and one for everything in it, folders last."""
    inside = [path for path in folder.iterdir() if path.suffix == ".py" and path.name != "__init__.py"]
    folders = [path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))]
    words = caption(folder / "__init__.py") or CAPTIONS.get(folder.relative_to(ROOT).as_posix(), "")
    lines = [line(f"{folder.name}/", words, depth)]
    lines += [line(path.name, caption(path), depth + 1) for path in sorted(inside)]
    return lines + [found for path in sorted(folders) for found in lines_of(path, depth + 1)]


def line(name: str, words: str, depth: int) -> str:
    """Return a name, indented, with its caption."""
    return f"{'  ' * depth + name:<{COLUMN}}{words}".rstrip()


def tree() -> str:
    """Return the whole tree as a block of text."""
    lines = [line(name, caption(ROOT / name), 0) for name in SCRIPTS]
    lines += [found for name in PACKAGES for found in lines_of(ROOT / name)]
    lines += [line(f"{name}/", words, 0) for name, words in CAPTIONS.items() if not name.startswith(PACKAGES)]
    return "\n".join(["```text", *lines, "```", ""])


def drawn(text: str) -> str:
    """Return the text of the page with its tree made anew."""
    return PLACE.sub(lambda place: f"{place[1]}{tree()}{place[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
