"""Start of the worker: `PYTHON .../gpujobd_worker/__main__.py --fd N`, N being the inherited end of the message pipe.

Rule 1: started by its path, under any interpreter, with nothing of gpujobd installed there. So the package is
registered by hand under its own name, and `gpujobd_worker.handlers.embed` can be imported.
Rule 2: neither the folder above (it may be the site-packages of another Python) nor this folder (its module names
would hide those of handlers) is on sys.path.
"""

from __future__ import annotations

import importlib.util
import os
import sys

FOLDER = os.path.dirname(os.path.abspath(__file__))


def register_package() -> None:
    """Make `gpujobd_worker` importable from this folder and no other."""
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != FOLDER]
    spec = importlib.util.spec_from_file_location(
        "gpujobd_worker", os.path.join(FOLDER, "__init__.py"), submodule_search_locations=[FOLDER]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["gpujobd_worker"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    register_package()
    from gpujobd_worker.process import main

    main(sys.argv[1:])
