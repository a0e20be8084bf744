"""Which module imports which, read from the sources, and the picture of it: `python tests/import_graph.py`.

Rooms stand in the order in which they may be imported: each knows those above it. The command writes the picture into
docs/architecture.md.
"""

import ast
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("rlhf", "rewards")
PAGE = ROOT / "docs" / "architecture.md"
PLACE = re.compile(r"(<!-- import graph -->\n).*?(<!-- end of import graph -->)", re.DOTALL)

# Room: what it is for, and its modules. Rooms of one number do not know each other.
ROOMS = {
    "start": ("plug-ins of accelerators, before torch", "rlhf rlhf.plugins"),
    "terms": (
        "device, shapes, measures, settings",
        "rlhf.device rlhf.types rlhf.measures rlhf.coerce rlhf.config rlhf.reading",
    ),
    "memory": (
        "what waits, is recomputed or streamed; attention",
        "rlhf.measured rlhf.attention rlhf.host_memory rlhf.recompute rlhf.streaming rlhf.quantise",
    ),
    "processes": (
        "who works together, and what they hand each other",
        "rlhf.exchange rlhf.layout rlhf.lifeline rlhf.parallel",
    ),
    "generator": ("ContentV, without a word of training", "rlhf.contentv rlhf.contentv.*"),
    "nano": ("the embedded model's world, judges and pretraining", "rlhf.nano rlhf.nano.*"),
    "rewards": ("reward models: video, prompts -> scores", "rewards rewards.*"),
    "method": (
        "noise -> prefix -> window -> loss -> adapter",
        "rlhf.sampler rlhf.grad_steps rlhf.drift rlhf.methods rlhf.adjoint rlhf.lora rlhf.sampling_copy "
        "rlhf.losses rlhf.optimizer rlhf.text rlhf.decoding rlhf.sharding rlhf.fields rlhf.speed",
    ),
    "checks": (
        "what can be wrong, before anything is loaded",
        "rlhf.parse rlhf.prompts rlhf.prompt_check rlhf.method_checks rlhf.reward_checks rlhf.speed_checks "
        "rlhf.parallel_checks rlhf.checkpoint rlhf.environment rlhf.run_folder rlhf.restarts rlhf.checks",
    ),
    "planning": (
        "memory and time of a step, worked out without storage",
        "rlhf.trace rlhf.parts rlhf.encoders rlhf.rates rlhf.memory_plan rlhf.time_plan rlhf.planner",
    ),
    "results": (
        "judging, comparing and showing what was learnt",
        "rlhf.figures rlhf.trackers rlhf.tracking rlhf.evaluate rlhf.compare rlhf.resampling "
        "rlhf.video_set rlhf.compare_sets rlhf.report rlhf.report.* rlhf.model_card rlhf.hub rlhf.lora_scale "
        "rlhf.export rlhf.generate rlhf.device_check",
    ),
    "training": (
        "the loop and what guards it",
        "rlhf.callbacks rlhf.setup rlhf.batches rlhf.calibrate rlhf.failures rlhf.watch rlhf.trainer rlhf.train",
    ),
}
# Against the order, with the reason.
EXCEPTIONS = {
    ("rlhf.device", "rlhf.device_check"): "`python -m rlhf.device --check` starts it, inside its main",
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the packages by its name, packages themselves included."""
    found = {}
    for path in sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str | None:
    names = (room for room, (_, patterns) in ROOMS.items() if any(fnmatchcase(module, p) for p in patterns.split()))
    return next(names, None)


def imported_by(tree: ast.Module) -> set[str]:
    """Modules of ours that a syntax tree imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inside & modules().keys() or {node.module}
    return found & modules().keys()


@cache
def imports() -> dict[str, set[str]]:
    """module -> the modules of ours that it imports."""
    read = lambda path: ast.parse(path.read_text(encoding="utf-8"))
    return {name: imported_by(read(path)) - {name} for name, path in modules().items()}


def between_rooms() -> dict[tuple[str, str], int]:
    """(room, room that it imports from) -> by how many of its modules; without the exceptions."""
    found = {}
    for module, names in imports().items():
        for room in {room_of(name) for name in names if (module, name) not in EXCEPTIONS} - {room_of(module)}:
            found[room_of(module), room] = found.get((room_of(module), room), 0) + 1
    return found


def mermaid() -> str:
    """The rooms and who imports whom, as a flow chart; what everybody imports (start, terms) is left out as a goal."""
    lines = ["```mermaid", "flowchart BT"]
    for room, (purpose, _) in ROOMS.items():
        lines.append(f'    {room}["<b>{room}</b><br>{purpose}"]')
    order = list(ROOMS)
    for (room, goal), _ in sorted(between_rooms().items(), key=lambda edge: [order.index(name) for name in edge[0]]):
        if goal not in ("start", "terms") or room in ("terms", "memory", "processes", "rewards"):
            lines.append(f"    {room} --> {goal}")
    return "\n".join([*lines, "```", ""])


def table() -> str:
    """A row for each room with its modules."""
    lines = ["| room | what it is for | modules |", "|---|---|---|"]
    for room, (purpose, _) in ROOMS.items():
        inside = [name for name in modules() if room_of(name) == room]
        lines.append(f"| {room} | {purpose} | {', '.join(f'`{name}`' for name in inside)} |")
    return "\n".join(lines) + "\n"


def drawn(text: str) -> str:
    """The text of the page with its picture and table made anew."""
    return PLACE.sub(lambda place: f"{place[1]}{mermaid()}\n{table()}{place[2]}", text)


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
