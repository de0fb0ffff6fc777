"""The bare loop: the same handler class, the same batches, nothing else. Prints seconds.

bare.py MODEL TEXTS.json BATCH THREADS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from gpujobd_worker.handlers.embed import Embed


def main(model: str, texts: str, batch: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    handler = Embed(device="cpu", model=model)
    items = [{"text": text} for text in json.loads(Path(texts).read_text())]
    handler([{"text": "warm after this"}])
    size = int(batch)
    began = time.perf_counter()
    for at in range(0, len(items), size):
        handler(items[at : at + size])
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main(*sys.argv[1:])
