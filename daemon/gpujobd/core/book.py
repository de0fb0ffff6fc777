"""The indexes over the jobs: lines, limits, timers. Everything here can be made anew from the jobs alone.

    place of a job          in which indexes
    queued, in line         lines[tenant][level, handler], ready[level]; its tenant is present at that level
    queued, asleep          asleep, by wake_ns; resting too, if it waits for another try
    running                 its tenant is present at the level of the lease
    any of these, paused    open_jobs, open_items, and the same in of_uid and of_tenant; deadlines
    final                   finals, final_bytes
    any                     stored_bytes, and the same in of_uid and of_tenant; inline, submit_ids

Rule 1: apply() takes a job out of its place, changes it, and puts it into its new place: `move`.
Rule 2: what is found on every turn of the daemon is O(1), what is changed is O(log n) and one memmove of pointers
(100,000 jobs: 20 us). No entry is ever stale.
Rule 3: a tenant that becomes present at a level starts there beside the last of those who can have a device, or, if
nobody is there, at the last such time: idle time earns nothing. With one device that is the least virtual time of all;
with more, whoever has fewer jobs than devices lags behind without waiting, and is nobody to start beside.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from operator import attrgetter
from typing import Final, TypeVar

from gpujobd.core.model import (
    FINAL,
    Book,
    Job,
    JobState,
    Line,
    Priority,
    Stamps,
    State,
    Tenant,
    Use,
)

Key = TypeVar("Key", str, int)

REBASE_NS: Final = 1 << 60  # of virtual time, at a level
VTIME_MAX_NS: Final = 1 << 63  # half of what a file can hold

_line_key = attrgetter("line_key")


def rebuild(state: State) -> None:
    """Make the bookkeeping anew."""
    book = state.book = Book()
    for job in state.jobs.values():
        _note(book, job)
        if job.state in FINAL:
            count(book, job.owner, job.tenant, stored=job.input_bytes + output_bytes(job))
            book.finals.append((job.finished_ns, job.job_id))
            book.final_bytes += output_bytes(job)
            continue
        _count(book, job)
        _place(book, job)
        level = _presence(job)
        if level is not None:
            book.present.setdefault(job.tenant, [0, 0, 0])[level] += 1
    _sort(book)
    for name, counts in book.present.items():
        for level in Priority:
            if counts[level]:
                insort(book.active[level], (state.tenants[name].vtimes_ns[level], name))
    for removal in state.removed.values():
        book.submit_ids.setdefault(removal.owner, {})[removal.submit_id] = removal.job_id
    for reservation in state.reservations.values():
        count_reserved(
            book, reservation.owner, reservation.tenant, 1, reservation.items, reservation.input_bytes
        )


def _sort(book: Book) -> None:
    """Jobs came by number, so most of these are in order already."""
    book.finals.sort()
    book.asleep.sort()
    book.resting.sort()
    book.deadlines.sort()
    for lines in book.lines.values():
        for line in lines.values():
            line.sort(key=_line_key)


def _place(book: Book, job: Job) -> None:
    """Append without order: rebuild sorts afterwards."""
    if job.deadline_ns:
        book.deadlines.append((job.deadline_ns, job.job_id))
    if job.state is JobState.QUEUED:
        if job.asleep:
            book.asleep.append((job.wake_ns, job.job_id))
            if job.retry_at_ns > job.begin_ns:
                book.resting.append((job.retry_at_ns, job.job_id))
        else:
            _line(book, job).append(job)
            book.ready[job.priority] += 1


# --- arrival and departure ------------------------------------------------------------------------------------


def admit(state: State, job: Job) -> None:
    """Index a job that was just submitted."""
    book = state.book
    _note(book, job)
    _count(book, job)
    if job.deadline_ns:
        insort(book.deadlines, (job.deadline_ns, job.job_id))
    _queue(state, job)


def forget(state: State, job: Job) -> None:
    """Drop a final job from every index; its submit id is remembered with the removal."""
    assert job.state in FINAL, (job.job_id, job.state)
    book = state.book
    _drop(book.finals, (job.finished_ns, job.job_id))
    book.final_bytes -= output_bytes(job)
    count(book, job.owner, job.tenant, stored=-job.input_bytes - output_bytes(job))
    book.inline.pop(job.job_id, None)


def move(state: State, job: Job, to: JobState, at_ns: int) -> None:
    """The one way a job changes state. Waiting time is summed up here; `level` must be set before a lease."""
    book = state.book
    was = _presence(job)
    _unqueue(book, job)
    if JobState.PAUSED in (job.state, to):
        count(book, job.owner, job.tenant, paused=1 if to is JobState.PAUSED else -1)
    if job.state is JobState.QUEUED and not job.asleep:
        job.waited_ns = max(0, at_ns - job.queued_ns)
    job.enter(to)
    if to is JobState.QUEUED:
        job.asleep = job.wake_ns > at_ns
        job.queued_ns = at_ns - job.waited_ns
        _queue(state, job, was)
        return
    job.asleep = False
    if to in FINAL:
        job.finished_ns = at_ns
        if job.deadline_ns:
            _drop(book.deadlines, (job.deadline_ns, job.job_id))
        count(book, job.owner, job.tenant, jobs=-1, items=-job.left)
        insort(book.finals, (at_ns, job.job_id))
        book.final_bytes += output_bytes(job)
    _shift_presence(state, job.tenant, was, _presence(job))


def wake(state: State, job: Job, at_ns: int) -> None:
    """The time a sleeping job waited for has come: it stands in line."""
    assert job.asleep, job.job_id
    _drop_asleep(state.book, job)
    job.asleep = False
    job.queued_ns = at_ns - job.waited_ns
    _queue(state, job)


def reorder(state: State, job: Job, priority: Priority, line_key: int) -> None:
    """Give a job that is not final another level or another place in its line."""
    was = _presence(job)
    _unqueue(state.book, job)
    job.priority = priority
    job.line_key = line_key
    if job.state is JobState.RUNNING:
        job.level = priority
    if job.state is JobState.QUEUED:
        _queue(state, job, was)
    else:
        _shift_presence(state, job.tenant, was, _presence(job))


def output_bytes(job: Job) -> int:
    return job.checkpoint.results_bytes + job.checkpoint.errors_bytes


# --- lines ------------------------------------------------------------------------------------------------------


def _line(book: Book, job: Job) -> Line:
    lines = book.lines.get(job.tenant)
    if lines is None:
        lines = book.lines[job.tenant] = {}
    key = (job.priority, job.handler)
    line = lines.get(key)
    if line is None:
        line = lines[key] = []
    return line


def _queue(state: State, job: Job, was: Priority | None = None) -> None:
    """Put a queued job to bed or in line. `was`: the level at which it made its tenant present so far."""
    book = state.book
    if job.asleep:
        insort(book.asleep, (job.wake_ns, job.job_id))
        if job.retry_at_ns > job.begin_ns:
            insort(book.resting, (job.retry_at_ns, job.job_id))
    else:
        line = _line(book, job)
        if not line or line[-1].line_key < job.line_key:
            line.append(job)
        else:
            insort(line, job, key=_line_key)
        book.ready[job.priority] += 1
    _shift_presence(state, job.tenant, was, _presence(job))


def _unqueue(book: Book, job: Job) -> None:
    if job.state is not JobState.QUEUED:
        return
    if job.asleep:
        _drop_asleep(book, job)
        return
    lines = book.lines[job.tenant]
    line = lines[job.priority, job.handler]
    index = 0 if line[0] is job else bisect_left(line, job.line_key, key=_line_key)
    assert line[index] is job, (job.job_id, job.line_key)
    del line[index]
    book.ready[job.priority] -= 1
    if not line:
        del lines[job.priority, job.handler]
        if not lines:
            del book.lines[job.tenant]


def _drop_asleep(book: Book, job: Job) -> None:
    _drop(book.asleep, (job.wake_ns, job.job_id))
    if job.retry_at_ns > job.begin_ns:
        _drop(book.resting, (job.retry_at_ns, job.job_id))


def _drop(stamps: Stamps, stamp: tuple[int, int]) -> None:
    index = bisect_left(stamps, stamp)
    assert stamps[index] == stamp, stamp
    del stamps[index]


# --- presence and virtual time ------------------------------------------------------------------------------------


def _presence(job: Job) -> Priority | None:
    """The level at which this job makes its tenant compete for a device, if it does."""
    if job.state is JobState.QUEUED:
        return None if job.asleep else job.priority
    return job.level if job.state is JobState.RUNNING else None


def _shift_presence(state: State, name: str, was: Priority | None, now: Priority | None) -> None:
    """Enter the new level before the old one is left: who moves within a level is present all the time."""
    if was == now:
        return
    book = state.book
    counts = book.present.get(name)
    if counts is None:
        counts = book.present[name] = [0, 0, 0]
    if now is not None:
        counts[now] += 1
        if counts[now] == 1:
            _join(state, state.tenants[name], now)
    if was is not None:
        counts[was] -= 1
        if counts[was] == 0:
            _drop_active(book, state.tenants[name], was)
            if not any(counts):
                del book.present[name]


def _join(state: State, tenant: Tenant, level: Priority) -> None:
    floor = start_ns(state, level)
    if tenant.vtimes_ns[level] < floor:
        tenant.vtimes_ns = with_level(tenant.vtimes_ns, level, floor)
    insort(state.book.active[level], (tenant.vtimes_ns[level], tenant.name))
    _advance_clock(state, level)


def start_ns(state: State, level: Priority) -> int:
    """The virtual time at which a newcomer to this level starts."""
    active = state.book.active[level]
    return active[min(len(active), max(1, len(state.devices))) - 1][0] if active else state.vclocks_ns[level]


def charge(state: State, tenant: Tenant, level: Priority, vtime_ns: int) -> None:
    """Move a tenant that is present at `level` on in virtual time."""
    if not vtime_ns:
        return
    _drop_active(state.book, tenant, level)
    moved = min(tenant.vtimes_ns[level] + vtime_ns, VTIME_MAX_NS)
    tenant.vtimes_ns = with_level(tenant.vtimes_ns, level, moved)
    insort(state.book.active[level], (moved, tenant.name))
    _advance_clock(state, level)


def _advance_clock(state: State, level: Priority) -> None:
    least = state.book.active[level][0][0]
    if least > state.vclocks_ns[level]:
        state.vclocks_ns = with_level(state.vclocks_ns, level, least)
    if least > REBASE_NS:
        _rebase(state, level, least)


def _rebase(state: State, level: Priority, least_ns: int) -> None:
    """Take the least off everybody's virtual time at this level: differences alone count.

    A share of 0.001 moves on a thousand times as fast as the clock: after months a number would be too large for a file.
    Who is not present and was behind starts at the least when it comes back, as it would have.
    """
    for tenant in state.tenants.values():
        tenant.vtimes_ns = with_level(tenant.vtimes_ns, level, max(0, tenant.vtimes_ns[level] - least_ns))
    active = state.book.active[level]
    active[:] = [(vtime_ns - least_ns, name) for vtime_ns, name in active]
    state.vclocks_ns = with_level(state.vclocks_ns, level, 0)


def _drop_active(book: Book, tenant: Tenant, level: Priority) -> None:
    active = book.active[level]
    index = bisect_left(active, (tenant.vtimes_ns[level], tenant.name))
    assert active[index][1] == tenant.name, (tenant.name, level)
    del active[index]


def with_level(triple: tuple[int, int, int], level: Priority, value: int) -> tuple[int, int, int]:
    changed = list(triple)
    changed[level] = value
    return (changed[0], changed[1], changed[2])


# --- counters -------------------------------------------------------------------------------------------------------


def _note(book: Book, job: Job) -> None:
    if job.inline_seq:
        book.inline[job.job_id] = job.inline_seq
    mine = book.submit_ids.get(job.owner)
    if mine is None:
        mine = book.submit_ids[job.owner] = {}
    mine[job.submit_id] = job.job_id


def _count(book: Book, job: Job) -> None:
    """All that a job which is not final takes up."""
    stored = job.input_bytes + output_bytes(job)
    paused = int(job.state is JobState.PAUSED)
    count(book, job.owner, job.tenant, jobs=1, paused=paused, items=job.left, stored=stored)


def count_reserved(book: Book, owner: int, tenant: str, sign: int, items: int, input_bytes: int) -> None:
    """Reservations count like jobs: what was promised at the door is there when the input has come."""
    count(book, owner, tenant, jobs=sign, items=sign * items, stored=sign * input_bytes)


def count(
    book: Book, owner: int, tenant: str, *, jobs: int = 0, paused: int = 0, items: int = 0, stored: int = 0
) -> None:
    """The one place where what quotas and limits are held against changes: for the house, the uid and the tenant."""
    book.open_jobs += jobs
    book.open_items += items
    book.stored_bytes += stored
    _add(book.of_uid, owner, jobs, paused, items, stored)
    _add(book.of_tenant, tenant, jobs, paused, items, stored)


def _add(uses: dict[Key, Use], key: Key, jobs: int, paused: int, items: int, stored: int) -> None:
    use = uses.get(key)
    if use is None:
        use = uses[key] = Use()
    use.jobs += jobs
    use.paused += paused
    use.items += items
    use.bytes += stored
    if not (use.jobs or use.items or use.bytes):
        del uses[key]
