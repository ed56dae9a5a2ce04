"""The structs that the C++ functions read their parameters from, as ctypes classes made from src/structs.h.

That header is the only declaration: a class has the name and the fields of the struct there, whose comments say what
they mean. Fields that are not given are zero. One that the struct lacks raises AttributeError, which mypy cannot know:
to it, each class is a `type[ctypes.Structure]`, whose fields are Any.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from ctypes import Structure, c_double, c_float, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

HEADER = Path(__file__).parent / "src" / "structs.h"
TYPES = {"int64_t": c_int64, "uint64_t": c_uint64, "float": c_float, "double": c_double, "Function": c_void_p}
FIELD = re.compile(r" {4}(?:const )?(\w+)((?:\*(?: const)?)*) (\w+);(?: *//.*)?")  # type, stars of a pointer, name


def read_structs(header: str) -> Mapping[str, type[Structure]]:
    """Return a class for each struct of a header, by name.

    Raises:
        ValueError: a line of a struct is not a field of a known type, or a pointer.
    """
    types: dict[str, Any] = dict(TYPES)
    for declaration in f"\n{header}".split("\nstruct ")[1:]:
        first, _, body = declaration.partition("\n};")[0].partition("\n")
        if not first.endswith(" {"):  # it is declared elsewhere
            continue
        name, fields = first.removesuffix(" {"), []
        for line in body.splitlines():
            match = FIELD.fullmatch(line)
            if match is None or not (match[2] or match[1] in types):
                raise ValueError(f"no field of a struct that Python can fill in: {name}: {line.strip()}")
            fields.append((match[3], c_void_p if match[2] else types[match[1]]))
        types[name] = type(name, (Structure,), {"_fields_": fields, "__slots__": ()})
    return {name: kind for name, kind in types.items() if name not in TYPES}


STRUCTS_H = HEADER.read_text(encoding="utf-8")
STRUCTS = read_structs(STRUCTS_H)


def __getattr__(name: str) -> type[Structure]:
    """Return the class of a struct, which can be imported from this module by its name."""
    if name in STRUCTS:
        return STRUCTS[name]
    raise AttributeError(f"{HEADER.name} declares no struct {name}")
