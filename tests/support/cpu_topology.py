"""A machine's CPUs, as Linux describes them."""

from pathlib import Path


def write_topology(folder: Path) -> None:
    """Write two packages with two cores of two threads. The second threads have the higher numbers, as on Intel's."""
    for cpu in range(8):
        described = folder / f"cpu{cpu}"
        described.mkdir()
        (described / "physical_package_id").write_text(f"{cpu % 4 // 2}\n")
        (described / "core_id").write_text(f"{cpu % 2}\n")
