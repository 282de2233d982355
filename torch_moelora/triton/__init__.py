"""CUDA implementations of the operators, in Triton."""
