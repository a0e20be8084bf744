"""Reproduce on nano the symptoms of docs/troubleshooting.md, and quote the output.

    python bench/symptoms.py [--only memory ...]

Each command of the page runs in a process of its own. Its last lines and a line for each step of
metrics.jsonl go between `<!-- said: NAME -->` and `<!-- end -->`. The page is written after each
command.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import make_parser

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "bench" / "results" / "symptoms.md"
COMMAND = re.compile(r"<!-- run: (\w+) -->\n(?:<!-- .*? -->\n)*```bash\n(.*?)\n```", re.DOTALL)
SHOWN = ("step", "reward", "saturated", "grad_norm", "learning_rate", "seconds", "eval/gain_trained")
SHOWN += ("eval/gain_held_out", "eval/hacking_gap", "eval/motion", "eval/high_frequency")
KEPT_LINES = 12


def commands(text: str) -> dict[str, str]:
    """Return the bash blocks of the page by their names."""
    return dict(COMMAND.findall(text))


def said_by(command: str, folder: Path) -> str:
    """Run a command of the page; return its last lines and its metrics as a table."""
    run = folder / "run"
    words = command.replace("accelerate launch train_rlhf.py", f"{shlex.quote(sys.executable)} train_rlhf.py")
    words = f"{words} --output_dir {shlex.quote(str(run))}"
    done = subprocess.run(["bash", "-c", words], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if is_said(line)]
    text = "\n".join(lines[-KEPT_LINES:]).replace(f"{run}", "runs/run").replace(f"{ROOT}/", "")
    rows = [json.loads(line) for line in read(run / "metrics.jsonl").splitlines()]
    return "\n\n".join(part for part in (text, metrics_table(rows)) if part)


def is_said(line: str) -> bool:
    """Return whether the program printed a line: no progress bar, library warning or traceback."""
    noise = ("train:", "evaluate", "W0", "Traceback", "warn", "/")
    of_traceback = re.match(r"    \S|  File ", line)
    return bool(line.strip()) and not (line.startswith(noise) or of_traceback or "Warning" in line or "%|" in line)


def read(path: Path) -> str:
    """Return a file's text; "" without the file."""
    return path.read_text() if path.exists() else ""


def metrics_table(rows: list[dict]) -> str:
    """Return the metrics of each step that the page shows, in columns."""
    names = [name for name in SHOWN if any(name in row for row in rows)]
    if not rows:
        return ""
    cells = [names, *([_number(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def _number(value: float | None) -> str:
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def fill(text: str, name: str, said: str) -> str:
    """Return the page with the output of a command in its place."""
    place = re.compile(rf"(<!-- said: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return place.sub(lambda found: f"{found[1]}\n```text\n{said}\n```\n\n{found[2]}", text)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(commands(PAGE.read_text())), metavar="NAME")
    chosen = parser.parse_args(argv).only or list(commands(PAGE.read_text()))
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            said = said_by(commands(PAGE.read_text())[name], Path(folder))
        PAGE.write_text(fill(PAGE.read_text(), name, said))
        print(f"--- {name}\n{said}", flush=True)


if __name__ == "__main__":
    main()
