"""Kernels in C++ for processors with AVX2, AVX-512 or AMX: the sources in `src`, and what compiles and calls them."""
