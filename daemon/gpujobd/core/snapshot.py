"""The whole state at one position of the journal, as bounded pieces, and back.

    pieces  := house | tenants* | jobs* | removals* | end
    piece   := msgpack map with the key "piece", at most CHUNK_BYTES_MAX bytes (one job is always far smaller)

Rule 1: `chunks` copies what may change at once, in its call; encoding comes as the pieces are taken, so that a
thread can do it while the state moves on.
Rule 2: only what is persistent is written; the bookkeeping is made anew by `load`.
Rule 3: a missing, doubled or foreign piece is an error, never a smaller state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec

from gpujobd.core.book import rebuild
from gpujobd.core.model import (
    NO_ACCURACY,
    NO_DEATHS,
    NO_PARAMS,
    Accuracy,
    Arrivals,
    Device,
    Job,
    Learned,
    Notifier,
    Removal,
    Reservation,
    State,
    Switches,
    Tenant,
)

CHUNK_BYTES_MAX: Final = 1 << 20
GROUP: Final = 128  # records encoded at a time; a group far below the size of a piece


class SnapshotError(Exception):
    """The pieces are not a snapshot; the message says how."""


class Piece(msgspec.Struct, frozen=True, kw_only=True, tag_field="piece", omit_defaults=True):
    pass


class House(Piece, frozen=True, tag="house"):
    """All that does not grow: bounded by the numbers of devices, handlers, users and connections."""

    seq: int
    next_job_id: int
    next_reservation_id: int
    head_key: int
    vclocks_ns: tuple[int, int, int]
    devices: list[Device]
    learned: list[Learned]
    reservations: list[Reservation]
    switches: Switches
    disk_full: bool
    disk_detail: str
    stopping: bool
    store_id: str
    arrivals: Arrivals = msgspec.field(default_factory=Arrivals)
    notifier: Notifier | None = None
    accuracy: Accuracy = NO_ACCURACY


class Tenants(Piece, frozen=True, tag="tenants"):
    tenants: list[Tenant]


class Jobs(Piece, frozen=True, tag="jobs"):
    jobs: list[Job]


class Removals(Piece, frozen=True, tag="removals"):
    removals: list[Removal]


class End(Piece, frozen=True, tag="end"):
    """How many there are of each."""

    tenants: int
    jobs: int
    removals: int


_encoder: Final = msgspec.msgpack.Encoder()
# What copy.copy calls, without its detour: it halves the time for which a snapshot holds the loop.
copy_tenant: Final[Callable[[Tenant], Tenant]] = Tenant.__copy__  # type: ignore[attr-defined]  # no stub has it
copy_job: Final[Callable[[Job], Job]] = Job.__copy__  # type: ignore[attr-defined]  # no stub has it

AnyPiece = House | Tenants | Jobs | Removals | End
_decoder: Final[msgspec.msgpack.Decoder[AnyPiece]] = msgspec.msgpack.Decoder(AnyPiece)


def chunks(state: State) -> Iterator[bytes]:
    """The pieces of a snapshot of `state` as it is now, whatever happens to it afterwards."""
    house = _encoder.encode(_house(state))
    tenants = [copy_tenant(tenant) for tenant in state.tenants.values()]
    jobs = [copy_job(job) for job in state.jobs.values()]
    removals = list(state.removed.values())
    return _chunks(house, tenants, jobs, removals)


def _house(state: State) -> House:
    return House(
        seq=state.seq,
        next_job_id=state.next_job_id,
        next_reservation_id=state.next_reservation_id,
        head_key=state.head_key,
        vclocks_ns=state.vclocks_ns,
        devices=list(state.devices.values()),
        learned=list(state.learned.values()),
        reservations=list(state.reservations.values()),
        switches=state.switches,
        disk_full=state.disk_full,
        disk_detail=state.disk_detail,
        stopping=state.stopping,
        store_id=state.store_id,
        arrivals=state.arrivals,
        notifier=state.notifier,
        accuracy=state.accuracy,
    )


def _chunks(house: bytes, tenants: list[Tenant], jobs: list[Job], removals: list[Removal]) -> Iterator[bytes]:
    yield house
    for at in range(0, len(tenants), GROUP):
        yield _encoder.encode(Tenants(tenants=tenants[at : at + GROUP]))
    for at in range(0, len(jobs), GROUP):
        yield from _split(jobs[at : at + GROUP])
    for at in range(0, len(removals), GROUP):
        yield _encoder.encode(Removals(removals=removals[at : at + GROUP]))
    yield _encoder.encode(End(tenants=len(tenants), jobs=len(jobs), removals=len(removals)))


def _split(jobs: list[Job]) -> Iterator[bytes]:
    """One piece, or two of half the jobs where one would be too large (a thousand deferred items each)."""
    piece = _encoder.encode(Jobs(jobs=jobs))
    if len(piece) <= CHUNK_BYTES_MAX:
        yield piece
        return
    assert len(jobs) > 1, len(piece)
    yield from _split(jobs[: len(jobs) // 2])
    yield from _split(jobs[len(jobs) // 2 :])


def load(pieces: Iterable[bytes]) -> State:
    """The state that was written, with its bookkeeping.

    Raises:
        SnapshotError: these are not all the pieces of one snapshot, or not a snapshot at all.
    """
    state: State | None = None
    names: dict[str, str] = {}
    end: End | None = None
    for data in pieces:
        piece = _decode(data)
        if end is not None or (state is None) != isinstance(piece, House):
            raise SnapshotError(f"a piece of kind {type(piece).__name__} is out of place")
        if isinstance(piece, House):
            state = _state(piece)
        elif isinstance(piece, End):
            end = piece
        else:
            assert state is not None
            _add(state, piece, names)
    if state is None or end is None:
        raise SnapshotError("the snapshot has no end")
    here = (len(state.tenants), len(state.jobs), len(state.removed))
    if here != (end.tenants, end.jobs, end.removals):
        raise SnapshotError(f"tenants, jobs, removals: {here} of {(end.tenants, end.jobs, end.removals)}")
    rebuild(state)
    return state


def _decode(data: bytes) -> AnyPiece:
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, ValueError) as error:
        raise SnapshotError(f"not a piece of a snapshot: {error}") from None


def _state(house: House) -> State:
    return State(
        seq=house.seq,
        next_job_id=house.next_job_id,
        next_reservation_id=house.next_reservation_id,
        head_key=house.head_key,
        vclocks_ns=house.vclocks_ns,
        devices={device.name: device for device in house.devices},
        learned={learned.name: learned for learned in house.learned},
        reservations={held.reservation_id: held for held in house.reservations},
        switches=house.switches,
        disk_full=house.disk_full,
        disk_detail=house.disk_detail,
        stopping=house.stopping,
        store_id=house.store_id,
        arrivals=house.arrivals,
        notifier=house.notifier,
        accuracy=house.accuracy,
    )


def _add(state: State, piece: Tenants | Jobs | Removals, names: dict[str, str]) -> None:
    if isinstance(piece, Jobs):
        for job in piece.jobs:
            _share(job, names)
            state.jobs[job.job_id] = job
    elif isinstance(piece, Tenants):
        for tenant in piece.tenants:
            state.tenants[tenant.name] = tenant
    else:
        for removal in piece.removals:
            state.removed[removal.job_id] = removal


def _share(job: Job, names: dict[str, str]) -> None:
    """Jobs that were read come with copies of what they have in common: a quarter of their memory."""
    job.tenant = names.setdefault(job.tenant, job.tenant)
    job.handler = names.setdefault(job.handler, job.handler)
    job.params = job.params or NO_PARAMS
    job.deaths = job.deaths or NO_DEATHS
    if job.line_key == job.job_id:
        job.line_key = job.job_id
    if job.queued_ns == job.submitted_ns:
        job.queued_ns = job.submitted_ns


def clone(state: State) -> State:
    """A second state, equal and independent: strings, tuples and frozen records are shared, the rest is copied."""
    twin = _state(_decode_house(_encoder.encode(_house(state))))
    twin.tenants = {name: copy_tenant(tenant) for name, tenant in state.tenants.items()}
    twin.jobs = {job_id: copy_job(job) for job_id, job in state.jobs.items()}
    twin.removed = dict(state.removed)
    rebuild(twin)
    return twin


def _decode_house(data: bytes) -> House:
    house = _decode(data)
    assert isinstance(house, House)
    return house
