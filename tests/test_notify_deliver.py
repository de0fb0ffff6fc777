"""Delivery: one far end's trouble is its own, and what waits, waits on disk."""

from __future__ import annotations

import contextlib
import datetime as dt
import sqlite3

import pytest
import trio
from gpujobd_notify import due as due_
from gpujobd_notify import hook
from gpujobd_notify.config import Config, File, HookEndpoint, Mail, MailEndpoint, Targets, Webhooks
from gpujobd_notify.due import Due, Record, Story
from gpujobd_notify.outcome import DELIVERED, Outcome, Verdict, later, never
from gpujobd_notify.schedule import GIVE_UP_S
from gpujobd_notify.store import EVERYBODY, Book, Cursor, Store, StoreBusyError, StoreError
from gpujobd_notify.thread import Asked

deliver = pytest.importorskip("gpujobd_notify.deliver")

AT = dt.datetime(2026, 1, 31, 12, 0, tzinfo=dt.UTC)
OPEN = Config(file=File(targets=Targets(url_hosts=("*",)), mail=Mail(host="mail.example.org")))


@pytest.fixture(autouse=True)
def _no_authorities(monkeypatch):
    """Nothing here speaks TLS, and reading the system's list takes longer than most of these tests."""
    monkeypatch.setattr(deliver.webhook, "contexts", lambda _: None)


@pytest.fixture
def store(tmp_path):
    with contextlib.closing(Store(tmp_path)) as store:
        yield store


def one(number, target="https://a.example.org/", *, uid=1000, urgent=False, kind="finish"):
    story = Story(kind=kind, at=AT, job=number, state="completed")
    return Due(key="over", uid=uid, target=target, urgent=urgent, story=story)


class Scene:
    """Deliveries whose tries are played by `play`; a far end's answer by its host."""

    def __init__(self, store, config=OPEN, clock=None):
        self.store = store
        self.asked = Asked(store)
        self.time = clock or (lambda: 1000.0 + trio.current_time())
        self.deliveries = deliver.Deliveries(config, self.asked, now=self.time, chance=lambda: 0.5)
        self.deliveries._send = self._send
        self.tries = []
        self.hosts = {}
        self.most = 0
        self.seq = 0

    async def _send(self, far, rows) -> Outcome:
        self.tries.append((far.name, [row.job for row in rows], rows[0].urgent))
        self.most = max(self.most, self.deliveries.in_flight)
        answer = self.hosts.get(far.name, DELIVERED)
        if callable(answer):
            return await answer(rows)
        return answer

    def post(self, *dues):
        self.seq += 1
        postings = [self.deliveries.posting(each) for each in dues]
        book = Book(cursor=Cursor(seq=self.seq), records={}, postings=postings, now=self.time())
        self.store.commit(book)
        self.deliveries.poke()

    def states(self):
        return {row.job: row.state for row in self.store.list(None, 0, (), 0, 5000)}


@contextlib.asynccontextmanager
async def running(scene):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.deliveries.run)
        yield scene
        nursery.cancel_scope.cancel()


async def until_quiet(true):
    """The outbox answers in a thread, and virtual time stands still meanwhile: a few real looks."""
    with trio.fail_after(30):
        while not true():  # noqa: ASYNC110  # what it waits for is in a file
            await trio.sleep(0.05)


A, B = "https://a.example.org:443", "https://b.example.org:443"


async def hang(rows):
    await trio.sleep_forever()


async def test_one_far_end_that_hangs_delays_no_other(store):
    scene = Scene(store)
    scene.hosts[A] = hang
    async with running(scene):
        scene.post(
            *(one(n) for n in range(1, 200)), *(one(n, "https://b.example.org/") for n in range(200, 230))
        )
        await until_quiet(lambda: sum(state == "delivered" for state in scene.states().values()) == 30)
    assert {job for job, state in scene.states().items() if state == "delivered"} == set(range(200, 230))
    assert scene.most <= 4 + 4


async def test_an_alert_does_not_wait_behind_news(store):
    scene = Scene(store)

    async def slow_news(rows):
        if not rows[0].urgent:
            await trio.sleep_forever()
        return DELIVERED

    scene.hosts[A] = slow_news
    async with running(scene):
        scene.post(*(one(n) for n in range(1, 50)))
        await until_quiet(lambda: len(scene.tries) == 4)
        scene.post(one(99, urgent=True, kind="stall"))
        await until_quiet(lambda: scene.states()[99] == "delivered")


async def test_five_failures_open_the_breaker_and_nothing_is_tried_meanwhile(store):
    scene = Scene(store)
    scene.hosts[A] = later("no", ill=True)
    async with running(scene):
        scene.post(*(one(n) for n in range(1, 60)))
        await until_quiet(lambda: len(scene.tries) >= 5)
        for _ in range(5):
            await trio.sleep(0.05)
        assert len(scene.tries) <= 5 + 3, "those that had begun"
        (view,) = [v for v in scene.deliveries.views({}, {}) if v.name == A]
        assert (view.state, view.last_error) == ("open", "no")
        untouched = [row for row in store.list(None, 0, (), 0, 100) if row.tries == 0]
        assert len(untouched) >= 50


async def test_a_404_is_about_one_message_and_opens_nothing(store):
    scene = Scene(store)
    scene.hosts[A] = later("answered 404", ill=False)
    async with running(scene):
        scene.post(*(one(n) for n in range(1, 30)))
        await until_quiet(lambda: len(scene.tries) == 29)


async def test_a_failed_try_waits_its_turn_on_the_schedule(store):
    scene = Scene(store)
    scene.hosts[A] = later("no", ill=False, asked_s=77.0)
    async with running(scene):
        scene.post(one(1))
        await until_quiet(lambda: store.get(1).tries == 1)
    row = store.get(1)
    assert (row.state, row.error) == ("pending", "no")
    assert 77 <= row.next_at - scene.time() + 10 <= 90


async def test_what_can_never_be_taken_is_failed_at_once(store):
    scene = Scene(store)
    scene.hosts[A] = never("550 no such user")
    async with running(scene):
        scene.post(one(1))
        await until_quiet(lambda: scene.states()[1] == "failed")
    assert store.get(1).error == "550 no such user"


async def test_410_ends_what_goes_to_that_url_and_to_no_other_on_its_host(store):
    scene = Scene(store)

    async def gone(rows):
        return Outcome(verdict=Verdict.GONE, error="410") if rows[0].target.endswith("/x") else DELIVERED

    scene.hosts[A] = gone
    async with running(scene):
        scene.post(
            *(one(n, "https://a.example.org/x") for n in range(1, 20)), one(50, "https://a.example.org/y")
        )
        await until_quiet(lambda: "pending" not in scene.states().values())
        assert {job for job, state in scene.states().items() if state == "delivered"} == {50}
        scene.post(one(60, "https://a.example.org/x"))
        assert scene.states()[60] == "failed"
    store.enable("https://a.example.org/x")
    scene.post(one(61, "https://a.example.org/x"))
    assert scene.states()[61] == "pending"


async def test_a_bug_in_one_message_leaves_the_others_alone(store, caplog):
    scene = Scene(store)

    async def bug(rows):
        if rows[0].job == 1:
            raise ValueError("of ours")
        return DELIVERED

    scene.hosts[A] = bug
    async with running(scene):
        scene.post(one(1), one(2))
        await until_quiet(lambda: scene.states()[2] == "delivered" and store.get(1).tries == 1)
    assert "a bug" in caplog.text


async def test_one_user_with_many_dead_hosts_leaves_places_to_others(store):
    scene = Scene(store)
    scene.hosts = {f"https://h{n}.example.org:443": hang for n in range(40)}
    async with running(scene):
        scene.post(*(one(n + 1, f"https://h{n}.example.org/", uid=1) for n in range(40)))
        await until_quiet(lambda: len(scene.tries) == 6)
        scene.post(one(99, "https://b.example.org/", uid=2))
        await until_quiet(lambda: scene.states()[99] == "delivered")


async def test_who_has_much_to_be_told_is_not_ahead_of_who_has_little(store):
    scene = Scene(store)
    order = []

    async def note(rows):
        order.append(rows[0].uid)
        return DELIVERED

    scene.hosts[A] = note
    scene.post(*(one(n, uid=1) for n in range(1, 100)))
    scene.post(one(500, uid=2))
    async with running(scene):
        await until_quiet(lambda: 2 in order)
    assert order.index(2) < 10


@pytest.mark.parametrize("places", [1, 2])
async def test_each_uid_in_turn_however_many_wait_before_it_and_few_the_places(store, places):
    scene = Scene(store)
    scene.post(*(one(n) for n in range(1, 300)))
    scene.post(one(300, uid=1001), one(301, uid=1002), one(302, uid=1002))
    latest, order = -1, []
    while len(order) < 8:
        sent = [
            row.number for row in store.list(None, 0, (), 0, 5000) if row.job in {job for _, job in order}
        ]
        found = store.next(A, scene.time(), places, urgent=False, but=sent, after_uid=latest)
        order += [(row.uid, row.job) for row in found]
        latest = found[-1].uid
    assert {uid for uid, _ in order[:3]} == {1000, 1001, 1002}
    assert {job for _, job in order} >= {1, 300, 301, 302}
    full = store.next(A, scene.time(), 4, urgent=False, full=[1000])
    assert {row.uid for row in full} == {1001, 1002}


async def test_an_error_as_long_as_a_far_end_likes_is_kept_short(store):
    scene = Scene(store)
    scene.hosts[A] = later("x" * 200_000, ill=True)
    async with running(scene):
        scene.post(*(one(n) for n in range(1, 6)))  # so many that the breaker opens, and the far end is kept
        await until_quiet(lambda: len(scene.tries) == 5 and not scene.deliveries.in_flight)
    (view,) = scene.deliveries.views({}, {})
    assert len(view.last_error) == 500


async def test_a_digest_is_one_mail_for_each_reader_and_an_alert_waits_for_none(store):
    mail = Mail(host="mail.example.org", digest_s=60)
    config = Config(file=File(mail=mail, targets=Targets(mail_domains=("*",))))
    scene = Scene(store, config, clock=lambda: 1000.0)
    scene.post(*(one(n, "mailto:a@example.org") for n in range(1, 10)))
    scene.post(one(20, "mailto:b@example.org"), *(one(n, "mailto:a@example.org") for n in range(10, 15)))
    scene.post(one(30, "mailto:a@example.org", urgent=True, kind="stall"))
    async with running(scene):
        await until_quiet(lambda: scene.states()[30] == "delivered")
        assert scene.tries == [("mailto:", [30], True)]
    late = Scene(store, config, clock=lambda: 2000.0)
    async with running(late):
        await until_quiet(lambda: "pending" not in late.states().values())
    assert sorted(jobs for _, jobs, _ in late.tries) == [list(range(1, 15)), [20]]


async def test_an_endpoint_that_is_not_configured_any_more_keeps_what_waits_for_it(store):
    endpoint = HookEndpoint(program=("/bin/true",))
    scene = Scene(store, Config(file=File(endpoints={"page": endpoint})))
    scene.post(one(1, "page"), one(2, "gone"))
    async with running(scene):
        await until_quiet(lambda: scene.states()[1] == "delivered")
        assert scene.states()[2] == "pending"
        await scene.deliveries.reload(Config(file=File(endpoints={"gone": endpoint})))
        await until_quiet(lambda: scene.states()[2] == "delivered")


async def test_stop_waits_for_what_is_in_flight_and_begins_nothing(store):
    scene = Scene(store)
    go_on = trio.Event()

    async def wait(rows):
        await go_on.wait()
        return DELIVERED

    scene.hosts[A] = wait
    async with running(scene):
        scene.post(*(one(n) for n in range(1, 20)))
        await until_quiet(lambda: len(scene.tries) == 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.deliveries.stop)
            await trio.sleep(0.05)
            go_on.set()
    assert list(scene.states().values()).count("delivered") == 4


# --- hooks --------------------------------------------------------------------------------------------------------


def script(tmp_path, text):
    path = tmp_path / "hook"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return [str(path)]


async def run_hook(program, timeout_s=30.0, body=b'{"job": 7}', **environment):
    return await hook.run("page", program, environment, body, "msg_1", timeout_s)


async def test_a_hook_gets_the_event_and_an_environment_by_list(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    out = tmp_path / "out"
    outcome = await run_hook(script(tmp_path, f"cat > {out}; env >> {out}"), EXTRA="yes")
    assert outcome is DELIVERED
    lines = out.read_text().replace("}", "}\n").splitlines()
    assert lines[0] == '{"job": 7}'
    names = {line.partition("=")[0] for line in lines[1:]} - {"PWD", "SHLVL", "_", "OLDPWD"}
    assert names == {"PATH", "LANG", "GPUJOBD_NOTIFICATION_ID", "EXTRA"}


@pytest.mark.parametrize(("text", "told"), [("exit 3", "ended with 3"), ("kill -9 $$", "ended with -9")])
async def test_a_hook_that_fails_is_tried_again(tmp_path, text, told):
    outcome = await run_hook(script(tmp_path, text))
    assert (outcome.verdict, outcome.error) == (Verdict.LATER, told)


async def test_a_hook_that_hangs_is_ended_with_all_it_started(tmp_path):
    pids = tmp_path / "pids"
    outcome = await run_hook(script(tmp_path, f"sleep 1000 & echo $! > {pids}; wait"), timeout_s=0.5)
    assert outcome.error == "did not end within 0.5 s"
    assert_ended(int(pids.read_text()))


async def test_what_a_hook_leaves_behind_is_ended_too_and_not_waited_for(tmp_path):
    pids = tmp_path / "pids"
    assert await run_hook(script(tmp_path, f"sleep 1000 & echo $! > {pids}")) is DELIVERED
    assert_ended(int(pids.read_text()))


def assert_ended(pid):
    import time

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        # The latter: it went between the opening and the reading.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as stat:
            if stat.read().rpartition(") ")[2][0] != "Z":
                time.sleep(0.01)
                continue
        return
    raise AssertionError(f"{pid} lives")


async def test_a_hook_that_reads_nothing_and_writes_for_ever_costs_a_line(tmp_path, caplog):
    caplog.set_level("INFO")
    text = "head -c 3000000 /dev/zero | tr '\\0' x"
    assert await run_hook(script(tmp_path, text), body=b"x" * 1_000_000) is DELIVERED
    assert sum(len(record.getMessage()) for record in caplog.records) < 3000


async def test_a_hook_that_is_not_there_is_an_ill_far_end():
    assert (await run_hook(["/nowhere/hook"])).ill


# --- the outbox ---------------------------------------------------------------------------------------------------


def commit(store, *dues, now=1000.0, seq=1, records=None):
    from gpujobd_notify.store import Posting

    postings = [Posting(due=each, endpoint=A, next_at=now) for each in dues]
    return store.commit(Book(cursor=Cursor(seq=seq), records=records or {}, postings=postings, now=now))


def test_the_same_fact_is_in_the_outbox_once(store):
    assert commit(store, one(1), one(2)) == 2
    assert commit(store, one(1), one(3), seq=2) == 1
    assert store.cursor().seq == 2


def test_a_commit_that_fails_moves_nothing(store):
    record = Record(job=1, uid=1, handler="h", items=1, submitted_at=AT)
    bad = Book(cursor=Cursor(seq=9), records={1: record}, postings=[None], now=1.0)  # type: ignore[list-item]
    with pytest.raises(AttributeError):
        store.commit(bad)
    assert store.cursor() is None
    assert store.records([1]) == {}


def test_what_one_uid_may_have_pending_is_bounded(store):
    store.pending_per_uid_max = 3
    commit(store, *(one(n, uid=7) for n in range(1, 6)), one(9, uid=8))
    states = [(row.job, row.state) for row in store.list(None, 0, (), 0, 10)]
    assert states == [
        (1, "pending"),
        (2, "pending"),
        (3, "pending"),
        (4, "failed"),
        (5, "failed"),
        (9, "pending"),
    ]
    assert "at most 3" in store.get(4).error


def test_mutes_hold_for_what_is_pending_and_for_what_comes(store):
    commit(store, one(1, uid=7), one(2, uid=7), one(3, uid=8))
    store.mute(7, 1, "", 1.0, muted=True)
    store.mute(EVERYBODY, 0, A, 1.0, muted=True)
    assert {row.state for row in store.list(None, 0, (), 0, 10)} == {"muted"}
    store.mute(EVERYBODY, 0, A, 1.0, muted=False)
    commit(store, one(11, uid=7), one(1, uid=7, kind="pause"), seq=2)
    again = Due(key="pause:1", uid=7, target=one(1).target, urgent=False, story=one(1, kind="pause").story)
    commit(store, again, seq=3)
    assert [(row.job, row.state) for row in store.list(7, 0, (), 3, 10)] == [(11, "pending"), (1, "muted")]


def test_what_is_over_is_kept_for_a_while_and_what_is_too_old_is_given_up(store):
    commit(store, one(1), one(2), now=1000.0)
    store.delivered([1], 1000.0)
    assert store.tidy(1000.0 + 50, 100.0, GIVE_UP_S) == 0
    assert store.tidy(1000.0 + 101, 100.0, GIVE_UP_S) == 1
    store.tidy(1001.0 + GIVE_UP_S, 100.0, GIVE_UP_S)
    assert (store.get(2).state, store.get(2).error) == ("failed", "given up: ")


def test_a_retry_has_the_whole_schedule_before_it(store):
    commit(store, one(1))
    for _ in range(9):
        store.failed([1], "no", 1.0, 1.0)
    store.failed([1], "no", None, 1.0)
    store.retry(1, 5000.0)
    row = store.get(1)
    assert (row.state, row.tries, row.next_at, row.created_at, row.over_at) == (
        "pending",
        0,
        5000.0,
        5000.0,
        None,
    )


def test_two_notifiers_do_not_share_an_outbox(tmp_path, store):
    with pytest.raises(StoreBusyError):
        Store(tmp_path)


@pytest.mark.parametrize("what", ["a later version", "rubbish", "a torn page"])
def test_an_outbox_that_cannot_be_read_is_refused_and_left_as_it_is(tmp_path, what):
    with contextlib.closing(Store(tmp_path)) as store:
        commit(store, *(one(n) for n in range(1, 400)))
    path = tmp_path / "outbox.db"
    raw = bytearray(path.read_bytes())
    if what == "a later version":
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version=99")
    elif what == "rubbish":
        path.write_bytes(b"not a database, whatever its name says" * 100)
    else:
        raw[8192:20480] = b"\xff" * 12288
        path.write_bytes(raw)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"outbox\.db"):
        Store(tmp_path)
    assert path.read_bytes() == before


def test_names_of_mail_endpoints_have_digests_of_their_own(store):
    endpoint = MailEndpoint(to=("a@example.org",), digest_s=30.0)
    config = Config(file=File(mail=Mail(host="m"), endpoints={"ops": endpoint}, webhooks=Webhooks()))

    async def main():
        scene = Scene(store, config, clock=lambda: 1000.0)
        return scene.deliveries.posting(one(1, "ops")), scene.deliveries.posting(one(1, "ops", urgent=True))

    news, alert = trio.run(main)
    assert (news.next_at, news.digest) == (1030.0, True)
    assert (alert.next_at, alert.digest) == (1000.0, False)


def test_the_house_hears_of_jobs_on_nobodys_behalf():
    assert due_.HOUSE < 0 != EVERYBODY
