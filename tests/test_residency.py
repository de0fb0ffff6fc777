"""Who is let in, who stays and who leaves: the promises of core/residency.py, whatever the figures."""

from __future__ import annotations

from core_house import House
from gpujobd.core import inputs, residency
from gpujobd.core.model import DeviceState, HandlerRule, Rules
from gpujobd.core.residency import CONTEXT_BYTES, GROWTH_BYTES, MIB, Memory, Resident
from hypothesis import given, settings
from hypothesis import strategies as st

GIB = 1 << 30
SIZES = st.integers(0, 160).map(lambda gib: gib * GIB // 2)
TOTALS = st.integers(4, 160).map(lambda gib: gib * GIB)


@st.composite
def crowds(draw: st.DrawFn) -> tuple[list[Resident], Memory]:
    """Workers and others on a device, as a driver could tell of it."""
    total = draw(TOTALS)
    names = draw(st.lists(st.sampled_from("abcdef"), max_size=6, unique=True))
    residents, left = [], total
    for name in names:
        held = min(left, draw(SIZES) + CONTEXT_BYTES)
        left -= held
        residents.append(
            Resident(
                name=name,
                bytes=held,
                idle_since=draw(st.one_of(st.just(-1.0), st.floats(0, 1e6))),
                foreign_then_bytes=draw(SIZES),
            )
        )
    foreign = min(left, draw(SIZES))
    return residents, Memory(total_bytes=total, free_bytes=left - foreign, foreign_bytes=foreign)


def without(residents: list[Resident], gone: list[str], memory: Memory) -> tuple[list[Resident], Memory]:
    freed = sum(r.bytes for r in residents if r.name in gone)
    kept = [r for r in residents if r.name not in gone]
    fresh = Memory(
        total_bytes=memory.total_bytes,
        free_bytes=memory.free_bytes + freed,
        foreign_bytes=memory.foreign_bytes,
    )
    return kept, fresh


@settings(max_examples=60)
@given(crowds())
def test_idle_workers_leave_in_order_of_use_and_no_more_than_it_takes(
    crowd: tuple[list[Resident], Memory],
) -> None:
    residents, memory = crowd
    going = residency.leaving(residents, memory)
    by_name = {resident.name: resident for resident in residents}
    used = [by_name[name].idle_since for name in going]
    assert used == sorted(used)
    assert all(since >= 0 for since in used), "a worker that computes was dismissed"
    if going:
        spare = residency.spare_bytes(memory.total_bytes)
        _, before_last = without(residents, going[:-1], memory)
        assert before_last.free_bytes < spare, f"{going[-1]} left, and there was enough"


@settings(max_examples=60)
@given(crowds())
def test_once_they_have_left_nobody_else_does(crowd: tuple[list[Resident], Memory]) -> None:
    residents, memory = crowd
    assert residency.leaving(*without(residents, residency.leaving(residents, memory), memory)) == []


@settings(max_examples=60)
@given(crowds())
def test_nobody_leaves_for_others_that_have_not_grown(crowd: tuple[list[Resident], Memory]) -> None:
    residents, memory = crowd
    for name in [
        *residency.leaving(residents, memory),
        *filter(None, [residency.yielding(residents, memory)]),
    ]:
        (resident,) = [r for r in residents if r.name == name]
        assert memory.foreign_bytes >= resident.foreign_then_bytes + GROWTH_BYTES


@settings(max_examples=60)
@given(crowds())
def test_work_yields_only_when_memory_is_really_short_and_no_idle_worker_can_help(
    crowd: tuple[list[Resident], Memory],
) -> None:
    residents, memory = crowd
    name = residency.yielding(residents, memory)
    if name:
        assert memory.free_bytes < residency.short_bytes(memory.total_bytes)
        assert not residency.leaving(residents, memory)
        assert [r.idle_since for r in residents if r.name == name] == [-1.0]


@settings(max_examples=60)
@given(crowds())
def test_worker_loaded_after_others_have_grown_stays_beside_them(
    crowd: tuple[list[Resident], Memory],
) -> None:
    """What was just loaded has seen them as they are: it is not unloaded for what they held then."""
    residents, memory = crowd
    fresh = [
        Resident(
            name=r.name,
            bytes=r.bytes,
            idle_since=r.idle_since,
            foreign_then_bytes=memory.foreign_bytes,
        )
        for r in residents
    ]
    assert residency.leaving(fresh, memory) == []
    assert residency.yielding(fresh, memory) == ""


@given(crowds(), SIZES)
def test_who_fits_beside_the_others_does_not_exceed_the_device(
    crowd: tuple[list[Resident], Memory], wanted: int
) -> None:
    residents, memory = crowd
    if residency.fits(memory.total_bytes, memory.foreign_bytes, residents, wanted):
        held = sum(resident.bytes for resident in residents)
        assert held + wanted + CONTEXT_BYTES + memory.foreign_bytes <= memory.total_bytes


@given(TOTALS)
def test_reserves_grow_with_the_device_and_stay_small_on_small_ones(total: int) -> None:
    assert residency.short_bytes(total) < residency.spare_bytes(total) <= total // 4
    assert residency.short_bytes(total) <= total // 16


RULES = Rules(
    handlers={
        "small": HandlerRule(vram_bytes=2 * GIB),
        "large": HandlerRule(vram_bytes=30 * GIB),
        "new": HandlerRule(),
    }
)
ROOMS = st.one_of(st.just(-1), st.integers(0, 320).map(lambda quarter: quarter * GIB // 4))


def seen(house: House, room_bytes: int, trouble: str = "") -> list[str]:
    look = inputs.DeviceSeen(
        device="cuda:0", trouble=trouble, total_bytes=80 * GIB, room_bytes=room_bytes, detail="so"
    )
    return [type(event).__name__ for event in house.give(look)]


@settings(max_examples=40)
@given(st.lists(ROOMS, min_size=1, max_size=20))
def test_whatever_was_seen_before_the_device_takes_who_fits_into_the_room_seen_last(rooms: list[int]) -> None:
    house = House(RULES, ("cuda:0",))
    device = house.state.devices["cuda:0"]
    for room_bytes in rooms:
        seen(house, room_bytes)
        taken = {n for n in RULES.handlers if residency.takes(house.state, RULES, device, n)}
        assert taken == {
            name
            for name, rule in RULES.handlers.items()
            if room_bytes < 0 or rule.vram_bytes + CONTEXT_BYTES <= room_bytes
        }
        crowded = taken != set(RULES.handlers)
        assert device.state is (DeviceState.BUSY_ELSEWHERE if crowded else DeviceState.OK)
        assert seen(house, room_bytes) == [], "the same look twice is told twice"


TROUBLES = st.sampled_from(["", "", "DriverMismatch", "DeviceLost"])


@settings(max_examples=40)
@given(st.lists(st.tuples(ROOMS, TROUBLES), max_size=20))
def test_good_looks_and_a_canary_bring_every_device_back(looks: list[tuple[int, str]]) -> None:
    house = House(RULES, ("cuda:0",))
    device = house.state.devices["cuda:0"]
    for room_bytes, trouble in looks:
        seen(house, room_bytes, trouble)
    seen(house, -1)
    if device.state is DeviceState.UNHEALTHY:
        house.submit(handler="new")
        house.wait(1200)
        house.checkpoint(1, device="cuda:0")
    assert (device.state, device.reason, device.room_bytes) == (DeviceState.OK, "", -1)


def test_handler_that_ran_out_of_memory_is_tried_again_in_more_room_only() -> None:
    house = House(RULES, ("cuda:0",))
    device = house.state.devices["cuda:0"]
    house.submit(handler="new")
    house.give_back(0, device="cuda:0", cramped_bytes=6 * GIB)
    for more, taken in ((0, False), (255 * MIB, False), (256 * MIB, True)):
        assert residency.has_place(house.state, RULES, device, "new", 6 * GIB + more) is taken
    assert residency.takes(house.state, RULES, device, "small"), "others are not held to it"


def test_measured_figures_replace_declared_ones_even_smaller_ones() -> None:
    house = House(RULES, ("cuda:0",))
    house.submit(handler="large")
    assert residency.wants_bytes(house.state, RULES, "large") == 30 * GIB
    house.loaded("cuda:0", vram_bytes=4 * GIB)
    house.checkpoint(1, device="cuda:0", vram_bytes=9 * GIB)
    assert residency.needs_bytes(house.state, RULES, "large") == 4 * GIB  # with less room: smaller batches
    assert residency.wants_bytes(house.state, RULES, "large") == 9 * GIB
