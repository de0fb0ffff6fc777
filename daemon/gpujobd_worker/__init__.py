"""The worker: the other process. Standard library only, any CPython >= 3.9.

A handler may import two names from here, and needs neither:

    from gpujobd_worker import Rejected, Transient
"""

__version__ = "0.1.0"


class Rejected(Exception):
    """Raised by a handler: this item is against a rule, never try it again."""


class Transient(Exception):
    """Raised by a handler: not now. The item is tried again at the end of the job, five times in all."""
