"""gpujobd: the daemon that owns the GPU of one host."""

__version__ = "0.1.0"
