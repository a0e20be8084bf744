"""A stand-in for CANN's runtime libraries, with which the real torch_npu shows a device.

It computes nothing: operators would silently leave their outputs as they were. Use it with
`emulator.EmulatedNPU` only.
"""

import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

OWN = Path(__file__).with_name("runtime.c")
LIBRARIES = ("libhccl", "libacl_op_compiler", "libge_runner", "libgraph", "libacl_tdt_channel")  # all in one
RUNTIME_SYMBOL = re.compile(r"(acl(?!nn)[A-Za-z]|rt[A-Z]|Msprof)\w*")
LOOKED_UP_BY_NAME = re.compile(rb"(?<=\0)(acl(?:rt|mdl|op|prof|sys|Get|Set|Query)\w+)(?=\0)")


def build(folder: Path) -> Path:
    """Write and compile the libraries; the folder is then for LD_LIBRARY_PATH. Needs cc and nm."""
    source = folder / "standin.c"
    source.write_text(OWN.read_text() + "".join(f"uint64_t {name}(void) {{ return 0; }}\n" for name in _missing()))
    _compile(folder, "libascendcl", source)
    empty = folder / "empty.c"
    empty.touch()
    for name in LIBRARIES:
        _compile(folder, name, empty, "-Wl,--no-as-needed", f"-L{folder}", "-lascendcl", "-Wl,-rpath,$ORIGIN")
    return folder


def _missing() -> list[str]:
    """Return the symbols of the runtime that torch_npu's libraries need and runtime.c lacks."""
    package = Path(distribution("torch_npu").locate_file("torch_npu"))
    main = package / "lib" / "libtorch_npu.so"
    wanted = {name.decode() for name in LOOKED_UP_BY_NAME.findall(main.read_bytes())}
    for library in [main, package / "lib" / "libtensorpipe.so", *package.glob("_C*.so")]:
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
        wanted |= {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}
    defined = set(re.findall(r"\b(acl\w+)\(", OWN.read_text()))
    return sorted(name for name in wanted - defined if RUNTIME_SYMBOL.fullmatch(name))


def _compile(folder: Path, name: str, source: Path, *flags: str) -> None:
    output = ["-shared", "-fPIC", "-w", "-O1", source, "-o", folder / f"{name}.so", f"-Wl,-soname,{name}.so"]
    subprocess.run(["cc", *output, *flags], check=True)


if __name__ == "__main__":  # for trying things out: eval "$(python tests/npu/standin.py FOLDER)"
    print(f"export LD_LIBRARY_PATH={build(Path(sys.argv[1]).resolve())} STANDIN_NPU_COUNT=1 USE_ASCEND_NPU=1")
