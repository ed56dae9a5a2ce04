"""`lightwell doctor`."""

import argparse

from server.cli.parser import Commands


def add(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="say what this machine has, what would run, and what is missing",
        description="Report what this machine has, what would run on it, and how to mend what is missing.",
    )
    parser.set_defaults(run=_doctor)
    parser.add_argument("--json", action="store_true", help="Print the report as JSON")


def _doctor(arguments: argparse.Namespace) -> int:
    from server.cli.doctor import doctor

    return doctor(as_json=arguments.json)
