"""Several API processes: `server.main` loads their roles by name."""

from server.part import Part

PART = Part()
