"""`lightwell build-kernels`."""

import argparse
import os
import sys
from typing import NoReturn

from server.cli.parser import Commands

DESCRIPTION = """\
Compile the CPU kernels for this processor, unless this has been done, and print the path of the library. The server
does this at its first start if it finds a C++ compiler: $CXX, g++, c++, clang++, or the Python package ziglang.
"""


def add(commands: Commands) -> None:
    parser = commands.add_parser("build-kernels", help="compile the CPU kernels in advance", description=DESCRIPTION)
    parser.set_defaults(run=_build_kernels)
    parser.add_argument("--all", action="store_true", help="Compile for all processors, not only for this one")
    parser.add_argument(
        "--in-package",
        action="store_true",
        help="Store libraries next to their sources instead of in the cache folder, for images without a compiler",
    )


def _build_kernels(arguments: argparse.Namespace) -> NoReturn:
    """Replace this process by the engine's build script, since this one must not import torch."""
    flags = [*(["--all"] if arguments.all else []), *(["--in-package"] if arguments.in_package else [])]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "engine.parts.build_kernels.build", *flags])
