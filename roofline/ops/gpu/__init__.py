"""The GPU backend: each Triton kernel, then the launcher that checks and launches it."""
