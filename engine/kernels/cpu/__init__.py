"""Kernels in C++ for processors with AVX2 or AVX-512: the sources in `src`, and what compiles and calls them."""
