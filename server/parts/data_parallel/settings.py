"""The settings of several engines with the same model."""

from collections.abc import Mapping

from server.settings.setting import ENGINE, Setting, integer

SETTINGS: Mapping[str, Setting] = {
    "data_parallel_size": Setting(
        ENGINE,
        integer(1, 64),
        "Number of engines with the whole model. They share the CPUs and the memory of the machine, or have a GPU "
        "each. A request goes to one of them: the one that has cached most of its prompt, unless it is busy.",
    )
}
