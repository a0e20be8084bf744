"""Fenced code blocks of the guides, and the invisible comments above them.

<!-- needs: minutes -->     not run by the tests: minutes, network, weights, gpu, npu, or several of
them <!-- theirs -->             another project's code <!-- file: NAME -->         saved under this
name, for what comes after
"""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "bench" / "results").glob("*.md"))
NEEDS = {"minutes", "network", "weights", "gpu", "npu"}
FENCE = re.compile(
    r"(?P<marks>(?:<!-- [^\n]* -->\n+)*)^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the page, from 1
    marks: dict[str, str]  # of the comments above it: {"needs": "gpu, weights"}, {"theirs": ""}

    @property
    def needs(self) -> set[str]:
        return set(filter(None, self.marks.get("needs", "").split(", ")))

    @property
    def runs(self) -> bool:
        return not self.needs and "theirs" not in self.marks


@cache
def blocks(page: Path) -> list[Block]:
    text, found = page.read_text(encoding="utf-8"), []
    for fence in FENCE.finditer(text):
        marks = re.findall(r"<!-- (\w+)(?:: ([^\n]*))? -->", fence["marks"])
        line = text.count("\n", 0, fence.start("language")) + 1
        found.append(Block(fence["language"], fence["code"], line, dict(marks)))
    return found


def commands(code: str) -> list[list[str]]:
    """Return the commands of a bash block as words, without comments."""
    found = []
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=";&")
        words.whitespace_split = True
        command = []
        for word in words:
            if set(word) <= set(";&"):
                found.append(command)
                command = []
            else:
                command.append(word)
        found.append(command)
    return [command for command in found if command]


def python_words(command: list[str]) -> list[str] | None:
    """Return the arguments of python in a command; None for other programs."""
    words = command[1:] if re.match(r"[A-Z_]+=", command[0]) else command  # a variable for this command alone
    if words[:1] == ["contentv-rlhf"]:
        return ["-m", "rlhf.train", *words[1:]]
    if words[:2] == ["accelerate", "launch"]:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return words[script:]
    return words[1:] if words[:1] == ["python"] else None
