"""Say which build of PyTorch is installed and how large it is. `make install` runs it.

With an argument, cpu or cuda, exit with 1 if the other build is installed.
"""

import re
import sys
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

BELONGS_TO_TORCH = re.compile(r"torch|triton|(nvidia|cuda)[-_].*")  # what is installed for PyTorch alone


def num_bytes(distribution: Distribution) -> int:
    paths = (Path(str(file.locate())) for file in distribution.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


def build_of(torch: Distribution) -> str:
    """Return cpu or cuda."""
    version = Path(str(torch.locate_file("torch/version.py"))).read_text(encoding="utf-8")
    return "cpu" if re.search(r"^cuda\b.*= None$", version, re.MULTILINE) else "cuda"


def main(arguments: Sequence[str]) -> int:
    installed = {found.name: found for found in distributions()}
    torch = installed["torch"]
    build = build_of(torch)
    megabytes = sum(num_bytes(found) for name, found in installed.items() if BELONGS_TO_TORCH.fullmatch(name)) / 1e6
    advice = "" if arguments or build == "cpu" else "; without a GPU, make clean install TORCH=cpu takes less"
    print(f"torch {torch.version}, for {build}, {megabytes:,.0f} MB{advice}")
    if arguments and arguments[0] != build:
        print(f"TORCH={arguments[0]} was asked for: run make clean first, or see docs/install.md", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
