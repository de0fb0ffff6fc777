"""From the outbox to the far ends: what goes out when, and what becomes of it.

    outbox --(due, a place free, breaker not open)--> try --> delivered | next_at | failed

Rule 1: the queue is in the outbox. In memory is what is in flight, and a count for each far end that has something.
Rule 2: a far end has a lane and a breaker of its own (`lanes.py`, `breaker.py`): one that is dead delays no other.
Rule 3: alerts go first, and have a place that nothing else takes.
Rule 4: what a try brought is written down even if the process stops meanwhile. What cannot be written ends the process.
Rule 5: `except Exception` stands here once: a bug in one message must not keep all others from going out.
"""

from __future__ import annotations

import datetime as dt
import logging
import random
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import trio
from gpujobd import __version__
from gpujobd import protocol as p
from msgspec import UNSET

from gpujobd_notify import hook, mail, message, webhook
from gpujobd_notify.addresses import RESOLVERS_MAX
from gpujobd_notify.breaker import Breaker, Position
from gpujobd_notify.config import AnyEndpoint, Config, HookEndpoint, MailEndpoint, WebhookEndpoint, networks
from gpujobd_notify.due import Due
from gpujobd_notify.lanes import Crowd, Lane
from gpujobd_notify.outcome import Outcome, Verdict, later, never
from gpujobd_notify.schedule import GIVE_UP_S, next_wait_s
from gpujobd_notify.store import Posting, Row, Store
from gpujobd_notify.targets import MAILTO, TargetError, parse
from gpujobd_notify.thread import Asked

log = logging.getLogger("gpujobd-notify")

TIDY_S: Final = 60.0
IDLE_S: Final = 3600.0
MARGIN_S: Final = 10.0  # a try ends by itself; beyond this it is ended
AGENT: Final = f"gpujobd-notify/{__version__}"
MAIL_THREADS_MAX: Final = 256  # more than all lanes together begin: none waits for one that hangs
DAY_S: Final = 86_400.0


class Far:
    """One far end, while something goes there, or while it is in the configuration."""

    def __init__(self, name: str, endpoint: AnyEndpoint | None, places: int, timeout_s: float) -> None:
        self.name = name
        self.endpoint = endpoint  # None: a user's URL, or the server of mailto:
        self.timeout_s = timeout_s
        self.lane = Lane(places)
        self.breaker = Breaker()
        self.latest_uid = -1  # for whom the latest try was begun: the next uid's turn comes after it
        self.error = ""

    @property
    def kind(self) -> str:
        match self.endpoint:
            case None:
                return "mail" if self.name == MAILTO else "webhook"
            case _:
                return str(self.endpoint.__struct_config__.tag)

    @property
    def shared(self) -> bool:
        """Whether users chose it: its places are then counted by uid, too."""
        return self.endpoint is None and self.name != MAILTO


class Deliveries:
    """All of it."""

    def __init__(
        self,
        config: Config,
        asked: Asked,
        *,
        now: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._asked = asked
        self._now = now
        self._chance = chance
        self._fars: dict[str, Far] = {}
        self._in_flight: set[int] = set()  # numbers of the outbox
        self._crowd = Crowd()
        self._stopping = False
        self._poked = trio.Event()
        self._resolvers = trio.CapacityLimiter(RESOLVERS_MAX)
        self._house_resolvers = trio.CapacityLimiter(RESOLVERS_MAX)
        self._mail_threads = trio.CapacityLimiter(MAIL_THREADS_MAX)
        self._host = socket.gethostname()
        self._take(config)

    # --- configuration ----------------------------------------------------------------------------------------------

    def _take(self, config: Config) -> None:
        self._config = config
        self._web = webhook.contexts(config.file.webhooks.ca_file)
        self._mail = _server(config)

    async def reload(self, config: Config) -> None:
        """An endpoint that was changed is one nobody has tried yet."""
        before = self._config.file
        same_mail = before.mail == config.file.mail
        self._take(config)
        for name, far in list(self._fars.items()):
            endpoint = config.file.endpoints.get(name)
            same = (
                far.endpoint == endpoint
                and (far.kind != "mail" or same_mail)
                and before.webhooks == config.file.webhooks
            )
            if not same:
                del self._fars[name]
        changed = [n for n, endpoint in config.file.endpoints.items() if before.endpoints.get(n) != endpoint]
        await self._asked(Store.enable, *changed)
        self.poke()

    def posting(self, due: Due) -> Posting:
        """Where a Due is to stand in the outbox."""
        now = self._now()
        try:
            endpoint = parse(due.target).endpoint
        except TargetError as error:
            return Posting(due=due, endpoint="", next_at=now, error=str(error))
        digest_s = 0.0 if due.urgent else self._digest_s(endpoint)
        return Posting(due=due, endpoint=endpoint, next_at=now + digest_s, digest=digest_s > 0)

    def _digest_s(self, name: str) -> float:
        endpoint = self._config.file.endpoints.get(name)
        if isinstance(endpoint, MailEndpoint) and endpoint.digest_s is not None:
            return endpoint.digest_s
        return (
            self._config.file.mail.digest_s if name == MAILTO or isinstance(endpoint, MailEndpoint) else 0.0
        )

    def _far(self, name: str) -> Far | None:
        """None: it is not in the configuration (any more). What waits for it waits on, until it is, or is given up."""
        far = self._fars.get(name) or self._made(name)
        if far is not None:
            self._fars[name] = far
        return far

    def _made(self, name: str) -> Far | None:
        file, endpoint = self._config.file, self._config.file.endpoints.get(name)
        match endpoint:
            case WebhookEndpoint() | HookEndpoint() | MailEndpoint():
                places = endpoint.in_flight_max or self._places(endpoint)
                return Far(name, endpoint, places, self._timeout_s(endpoint))
            case None if name == MAILTO and self._mail is not None:
                return Far(name, None, file.mail.in_flight_max, file.mail.timeout_s)
            case None if "://" in name:
                return Far(name, None, file.webhooks.in_flight_max, file.webhooks.timeout_s)
        return None

    def _places(self, endpoint: AnyEndpoint) -> int:
        file = self._config.file
        return file.mail.in_flight_max if isinstance(endpoint, MailEndpoint) else file.webhooks.in_flight_max

    def _timeout_s(self, endpoint: AnyEndpoint) -> float:
        if isinstance(endpoint, MailEndpoint):
            return self._config.file.mail.timeout_s
        return endpoint.timeout_s or self._config.file.webhooks.timeout_s

    # --- the loop ---------------------------------------------------------------------------------------------------

    def poke(self) -> None:
        """Something is due, or a place is free."""
        self._poked.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tidy)
            while True:
                self._poked = trio.Event()  # before the look: what comes after it sets this one
                wake_at = await self._begin_all(nursery)
                with trio.move_on_after(min(IDLE_S, max(0.0, wake_at - self._now()))):
                    await self._poked.wait()

    async def stop(self) -> None:
        """Begin nothing more, and wait for what is in flight."""
        self._stopping = True
        while self._in_flight:
            self._poked = trio.Event()
            await self._poked.wait()

    async def _tidy(self) -> None:
        while True:
            keep_s = self._config.file.limits.keep_days * DAY_S
            await self._asked(Store.tidy, self._now(), keep_s, GIVE_UP_S)
            await trio.sleep(TIDY_S)

    async def _begin_all(self, nursery: trio.Nursery) -> float:
        """Begin every try that may begin now; when to look again, should nobody poke."""
        now = self._now()
        if self._stopping:
            return now + IDLE_S
        names, later_at = await self._asked(Store.waiting, now)
        wake_at = [later_at] if later_at is not None else []
        for name in names:
            far = self._far(name)
            if far is None:
                continue
            for urgent in (True, False):
                await self._begin(nursery, far, now, urgent=urgent)
            if far.breaker.position(now) is Position.OPEN:
                wake_at.append(far.breaker.until)
        self._forget_idle(names)
        return min(wake_at, default=now + IDLE_S)

    async def _begin(self, nursery: trio.Nursery, far: Far, now: float, *, urgent: bool) -> None:
        places = far.breaker.places(now, far.lane.free(urgent=urgent))
        if not places:
            return
        full = self._crowd.full(urgent=urgent) if far.shared else []
        rows = await self._asked(
            Store.next,
            far.name,
            now,
            places,
            urgent=urgent,
            but=tuple(self._in_flight),
            full=full,
            after_uid=far.latest_uid,
        )
        for row in rows:
            if row.number in self._in_flight or not far.breaker.places(now, far.lane.free(urgent=urgent)):
                continue  # the former: it rides in a digest that has just begun
            if far.shared and not self._crowd.free(row.uid, urgent=urgent):
                continue
            together = await self._together(far, row)
            self._in_flight.update(one.number for one in together)
            far.lane.enter(urgent=urgent)
            far.latest_uid = row.uid
            if far.shared:
                self._crowd.enter(row.uid, urgent=urgent)
            far.breaker.began(now)
            nursery.start_soon(self._try, far, together)

    async def _together(self, far: Far, row: Row) -> list[Row]:
        if far.kind != "mail" or row.urgent or not self._digest_s(far.name):
            return [row]
        rows = await self._asked(Store.digest, row, message.STORIES_MAX)
        return [one for one in rows if one.number not in self._in_flight] or [row]

    def _forget_idle(self, waiting: Iterable[str]) -> None:
        """Far ends that users named are as many as they like: those with nothing to say are not kept."""
        wanted = {*waiting}
        for name, far in list(self._fars.items()):
            closed = far.breaker.position(self._now()) is Position.CLOSED
            over = closed or self._now() > far.breaker.until + IDLE_S
            if far.shared and name not in wanted and not far.lane.in_flight and over:
                del self._fars[name]

    # --- one try ----------------------------------------------------------------------------------------------------

    async def _try(self, far: Far, rows: list[Row]) -> None:
        urgent, shared, outcome = rows[0].urgent, far.shared, None
        try:
            outcome = await self._attempt(far, rows)
            with trio.CancelScope(shield=True):
                await self._note(far, rows, outcome)
        finally:
            if outcome is None:
                far.breaker.broke_off()
            far.lane.leave(urgent=urgent)
            if shared:
                self._crowd.leave(rows[0].uid, urgent=urgent)
            self._in_flight.difference_update(row.number for row in rows)
            self.poke()

    async def _attempt(self, far: Far, rows: list[Row]) -> Outcome:
        try:
            with trio.move_on_after(far.timeout_s + MARGIN_S):
                return await self._send(far, rows)
        except Exception:
            log.exception("a bug: notification %d could not be sent", rows[0].number)
            return later("a bug of the notifier, told in its log", ill=False)
        return later(f"did not end within {far.timeout_s + MARGIN_S:g} s", ill=True)

    async def _send(self, far: Far, rows: list[Row]) -> Outcome:
        row = rows[0]
        match far.endpoint:
            case HookEndpoint() as endpoint:
                body = message.payload(row.story)
                return await hook.run(
                    far.name, endpoint.program, endpoint.environment, body, row.id, endpoint.timeout_s
                )
            case MailEndpoint() as endpoint:
                return await self._send_mail(rows, endpoint.to)
            case WebhookEndpoint() as endpoint:
                keys = [self._config.secrets[name] for name in endpoint.secrets]
                return await self._post(row, endpoint.url, keys, endpoint.allow_networks, far)
            case None:
                return await self._send_to_target(far, rows)

    async def _send_to_target(self, far: Far, rows: list[Row]) -> Outcome:
        """What a user named. What he may name may have changed since."""
        try:
            target = self._config.check_target(rows[0].target, admin=True)
        except TargetError as error:
            return never(str(error))
        if far.name == MAILTO:
            return await self._send_mail(rows, [target.address])
        return await self._post(rows[0], rows[0].target, [], self._config.file.targets.allow_networks, far)

    async def _post(
        self, row: Row, url: str, keys: Sequence[bytes], allowed: tuple[str, ...], far: Far
    ) -> Outcome:
        return await webhook.post(
            url,
            row.id,
            message.payload(row.story),
            keys=keys,
            allowed=networks(allowed),
            timeout_s=far.timeout_s,
            context=self._web,
            resolvers=self._resolvers if far.shared else self._house_resolvers,
            agent=AGENT,
        )

    async def _send_mail(self, rows: list[Row], to: Sequence[str]) -> Outcome:
        if self._mail is None:
            return later("there is no mail server in the configuration", ill=False)
        made = message.mail(
            [(row.id, row.story) for row in rows],
            sender=self._config.file.mail.sender or f"gpujobd@{self._host}",
            to=to,
            host=self._host,
            now=dt.datetime.now(dt.UTC),
        )
        return await mail.send(self._mail, made, to, self._mail_threads)

    async def _note(self, far: Far, rows: list[Row], outcome: Outcome) -> None:
        """Write down what a try brought."""
        now, numbers, row = self._now(), [row.number for row in rows], rows[0]
        far.error = error = outcome.error
        if outcome.ill:
            far.breaker.failed(now)
            if far.breaker.position(now) is Position.OPEN:
                log.warning("%s is left alone for %.0f s: %s", far.name, far.breaker.until - now, error)
        else:
            far.breaker.succeeded()
        match outcome.verdict:
            case Verdict.DELIVERED:
                await self._asked(Store.delivered, numbers, now)
                log.debug("notification %d of job %d went to %s", row.number, row.job, far.name)
            case Verdict.LATER:
                wait_s = next_wait_s(row.tries + 1, self._chance(), outcome.asked_s)
                next_at = None if wait_s is None else now + wait_s
                await self._asked(Store.failed, numbers, error, next_at, now)
                if next_at is None:
                    log.warning("notification %d of job %d is given up: %s", row.number, row.job, error)
            case Verdict.NEVER:
                await self._asked(Store.failed, numbers, error, None, now)
                log.warning("notification %d of job %d failed: %s", row.number, row.job, error)
            case Verdict.GONE:
                await self._asked(Store.disable, row.target if far.shared else far.name, error, now)
                log.warning("%s is disabled: %s", far.name, error)  # a whole URL may be a secret

    # --- what people ask --------------------------------------------------------------------------------------------

    def hurry(self, endpoint: str) -> None:
        """Somebody wants it tried now: an open breaker lets one through."""
        if endpoint in self._fars:
            self._fars[endpoint].breaker.hurry(self._now())
        self.poke()

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def views(self, queued: dict[str, int], disabled: dict[str, str]) -> list[p.EndpointView]:
        """Of the configuration, and of what is in use."""
        now, views = self._now(), []
        for name in sorted({*self._config.file.endpoints, *self._fars, *queued, *disabled} - {""}):
            far = self._fars.get(name) or self._made(name)
            if far is None:
                continue
            position = far.breaker.position(now)
            until = (
                dt.datetime.fromtimestamp(far.breaker.until, dt.UTC) if position is Position.OPEN else UNSET
            )
            views.append(
                p.EndpointView(
                    name=name,
                    kind=far.kind,
                    state=str(position),
                    in_flight=far.lane.in_flight,
                    queued=queued.get(name, 0),
                    until_at=until,
                    last_error=far.error or UNSET,
                    disabled=disabled.get(name, UNSET),
                )
            )
        return views


def _server(config: Config) -> mail.Server | None:
    given = config.file.mail
    if not given.host:
        return None
    password = config.secrets.get(given.password_secret, b"").decode("utf-8", "surrogateescape")
    return mail.Server(
        host=given.host,
        port=given.real_port,
        security=str(given.security),
        timeout_s=given.timeout_s,
        context=webhook.contexts(given.ca_file),
        user=given.user,
        password=password,
    )
