"""A short check of everything here that behaves differently on a GPU; `python -m benchmarks.gpu_check OUT`."""
