"""The operations in Triton, for GPUs. With TRITON_INTERPRET=1 in the environment they run on a CPU, for tests."""
