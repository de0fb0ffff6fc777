"""How many items a call gets: found by measuring, remembered for the worker's life.

What is fast differs by handler and device: on a GPU 256 items may take as long as one; on a CPU 8 may be best, and
32 slower than 1 (EfficientNet-Lite0: 38, 38, 24 images/s at 1, 8, 32). So sizes 1, 2, 4, ... `batch_max` are tried:

Rule 1: while climbing, a call shorter than SHORT_CALL_S asks for eight times the size at once: at that length the
worker's own cost a call matters more than the handler's. A handler that does nothing is at 256 after three calls.
Rule 2: any longer call is a sample. A size is judged by the median seconds an item of its last SAMPLES calls: the
first call of a size warms up allocators and kernels, and texts differ in length.
Rule 3: a size that is GAIN faster than the one below leads to the next; one that is not leads back to the one below,
which is kept. Of equals the smaller is kept: less memory, and the lease is given back sooner.
Rule 4: every PROBE_CALLS calls the size above and the size below are tried in turn. A move needs GAIN either way,
so two equal sizes do not swing.
Rule 5: doubling never makes a call longer than CALL_S_MAX, and calls twice as long shrink: others wait for its end.
Rule 6: out of memory at n: nothing above n // 2. After PATIENCE_CALLS good calls that ceiling rises by an eighth; each
further out-of-memory doubles the patience.
"""

from __future__ import annotations

import collections
import statistics

SHORT_CALL_S = 0.010
CALL_S_MAX = 5.0
SAMPLES = 3
GAIN = 1.05
PROBE_CALLS = 64
PATIENCE_CALLS = 100
PATIENCE_CALLS_MAX = 6400


class Sizer:
    """The size of the next call, given how the calls before went."""

    def __init__(self) -> None:
        self._size = 1  # in use, or being tried
        self._home = 0  # kept unless a probe beats it; 0: still climbing
        self._samples: dict[int, collections.deque[float]] = {}  # size -> seconds an item
        self._calls = 0  # since the last probe
        self._probe_up = True
        self._ceiling = 0  # 0: never ran out of memory
        self._good_calls = 0  # since the ceiling was last moved
        self._patience = PATIENCE_CALLS

    def size(self, batch_max: int) -> int:
        """For the next call, 1 to `batch_max`."""
        return min(self._size, self._bound(batch_max))

    def took(self, items: int, seconds: float, batch_max: int) -> None:
        """A call of `items` succeeded."""
        self._raise_ceiling(batch_max)
        if items != self.size(batch_max):
            return  # cut short by the end of the job or by suspects: says nothing about a size
        self._size = items
        bound = self._bound(batch_max)
        kept = self._samples.setdefault(items, collections.deque(maxlen=SAMPLES))
        kept.append(seconds / items)
        if seconds > 2 * CALL_S_MAX and items > 1:
            self._settle(max(1, int(items * CALL_S_MAX / seconds)))
        elif self._home == 0 and seconds < SHORT_CALL_S:
            self._size = min(items * 8, bound)
        elif len(kept) == SAMPLES:
            self._judge(seconds, bound)

    def too_big(self, items: int) -> None:
        """A call of `items` ran out of memory."""
        if self._ceiling:
            self._patience = min(self._patience * 2, PATIENCE_CALLS_MAX)
        self._ceiling = max(1, items // 2)
        self._good_calls = 0
        self._settle(self._ceiling)

    def _bound(self, batch_max: int) -> int:
        return max(1, min(batch_max, self._ceiling) if self._ceiling else batch_max)

    def _judge(self, seconds: float, bound: int) -> None:
        """The size in use has all its samples."""
        longer = min(self._size * 2, bound) if 2 * seconds <= CALL_S_MAX else self._size
        if self._home == 0:
            self._climb(longer)
        elif self._size != self._home:
            self._end_probe()
        else:
            self._rest(longer)

    def _climb(self, longer: int) -> None:
        below = max((size for size in self._samples if size < self._size), default=0)
        if below and not self._faster(self._size, below):
            self._settle(below)
        elif longer > self._size:
            self._try(longer)
        else:
            self._settle(self._size)

    def _end_probe(self) -> None:
        if not self._faster(self._size, self._home):
            self._size = self._home
        elif self._size > self._home:
            self._home = 0  # its samples stand: the next call climbs on
        else:
            self._settle(self._size)

    def _rest(self, longer: int) -> None:
        self._calls += 1
        if self._calls >= PROBE_CALLS:
            self._calls = 0
            self._try(longer if self._probe_up else max(1, self._size // 2))
            self._probe_up = not self._probe_up

    def _try(self, size: int) -> None:
        if size != self._size:
            self._samples.pop(size, None)
            self._size = size

    def _settle(self, size: int) -> None:
        self._size = self._home = size
        self._calls = 0

    def _faster(self, size: int, than: int) -> bool:
        if than not in self._samples:
            return True
        return statistics.median(self._samples[size]) * GAIN < statistics.median(self._samples[than])

    def _raise_ceiling(self, batch_max: int) -> None:
        if not 0 < self._ceiling < batch_max:
            return
        self._good_calls += 1
        if self._good_calls >= self._patience:
            self._good_calls = 0
            self._ceiling += max(1, self._ceiling // 8)
