"""The worker: the other process. Standard library only, any CPython >= 3.9."""
