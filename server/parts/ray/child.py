"""The server of a replica: the supervisor, as `lightwell serve` runs it, with its settings on standard input."""

import os
import sys

import msgspec

from engine.shared.launcher import die_with_parent
from server.cli.parser import USAGE_ERROR, fail
from server.model_paths import ModelError
from server.processes.child_process import SupervisorError
from server.settings.setting import SettingsError
from server.settings.table import Settings
from server.supervisor import supervise


def main() -> int:
    """Serve until SIGTERM. Return the exit status."""
    die_with_parent(os.getppid())
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=Settings)
    try:
        return supervise(settings)
    except SettingsError as error:
        return fail(str(error), USAGE_ERROR)
    except (ModelError, SupervisorError) as error:
        return fail(str(error))


if __name__ == "__main__":
    sys.exit(main())
