"""Compile and load a C module the way Triton does for its driver, with the same headers; no GPU is needed.

`test-image.sh` runs it in the image. Prints the version of CUDA's headers, or exits with an error.
"""

import os
from pathlib import Path

import triton
from triton.runtime.build import compile_module_from_src

SOURCE = """
#include "cuda.h"
#include <dlfcn.h>
#include <stdbool.h>
#include <stdlib.h>
#include <Python.h>

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "check_triton", NULL, -1, NULL};

PyMODINIT_FUNC PyInit_check_triton(void) {
  PyObject *module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "cuda_version", CUDA_VERSION);
  return module;
}
"""

if __name__ == "__main__":
    headers = Path(os.path.realpath(triton.__file__)).parent / "backends" / "nvidia" / "include"
    module = compile_module_from_src(SOURCE, "check_triton", include_dirs=[str(headers)])
    print(f"Triton's C module can be compiled, with the headers of CUDA {module.cuda_version}")
