"""The door: what may come in. Every limit is met here, before a byte is streamed, and never half-way.

Rule 1: a busy device refuses nobody; only a full queue does, and it says how full.
Rule 2: room is held from `Reserve` to `Submit`. What was admitted once is not refused for room later.
Rule 3: a submit_id names one submission of one uid: a repeat finds the job, other content is a conflict.
Rule 4: a limit of the house is everybody's; a quota, of a uid or a tenant, keeps one from taking all of it.
Administrators have none of their own: they submit for others. What is held against a quota is in the state, so that a
restart forgives nothing.
Rule 5: the header is all that is known of an input; the shell checks the bytes against it.
"""

from __future__ import annotations

import math
from typing import Final

from gpujobd.core import policy, rights, telling
from gpujobd.core.events import AnyEvent, ReservationReleased, Reserved, Submitted
from gpujobd.core.inputs import Release, Reserve, Submission, Submit, Who
from gpujobd.core.model import (
    FINAL,
    MINUTE_NS,
    NO_PARAMS,
    NO_USE,
    Job,
    ParamRule,
    ParamValue,
    Priority,
    Reservation,
    Rules,
    State,
)
from gpujobd.core.refused import Refused
from gpujobd.protocol import ErrorCode

SUBMIT_ID_CHARS_MAX: Final = 64
NAME_CHARS_MAX: Final = 100
MESSAGE_CHARS_MAX: Final = 500
PARAM_CHARS_MAX: Final = 1_000
INT64_MAX: Final = (1 << 63) - 1
INPUT_SHA256_BYTES: Final = 32
STORED: Final = "bytes of inputs and outputs"


def find_submitted(state: State, who: Who, submission: Submission) -> int:
    """The job this submission already became, or 0. Removed jobs are remembered for seven days.

    Raises:
        Refused: conflict, where the submit_id stands for other content.
    """
    job_id = state.book.submit_ids.get(who.uid, {}).get(submission.submit_id, 0)
    if not job_id:
        return 0
    job = state.jobs.get(job_id)
    if job is None:
        same = state.removed[job_id].input_sha256 == submission.input_sha256
    else:
        same = _same(who, job, submission)
    if not same:
        raise Refused(
            ErrorCode.CONFLICT,
            f"submit_id {submission.submit_id} was used for other content, as job {job_id}",
        )
    return job_id


def _same(who: Who, job: Job, submission: Submission) -> bool:
    """Whether the job came from this very submission. Its priority may have changed, its defaults were filled in."""
    return (
        job.input_sha256 == submission.input_sha256
        and job.items == submission.items
        and job.input_bytes == submission.input_bytes
        and job.handler == submission.handler
        and job.tenant == tenant_of(who, submission)
        and job.name == submission.name
        and job.begin_ns == submission.begin_ns
        and job.deadline_ns == submission.deadline_ns
        and job.failures_max == submission.failures_max
        and job.retry_of == submission.retry_of
        and job.notify == submission.notify
        and job.notify_on == submission.notify_on
        and all(job.params.get(name) == value for name, value in submission.params.items())
    )


def tenant_of(who: Who, submission: Submission) -> str:
    return submission.tenant or who.name or str(who.uid)


# --- reserve, submit, release -------------------------------------------------------------------------------------


def reserve(state: State, rules: Rules, given: Reserve, now_ns: int) -> list[AnyEvent]:
    who, submission = given.who, given.submission
    if find_submitted(state, who, submission):
        return []
    _check(state, rules, who, submission, now_ns)
    return [
        Reserved(
            at_ns=now_ns,
            reservation_id=state.next_reservation_id,
            owner=who.uid,
            tenant=tenant_of(who, submission),
            items=submission.items,
            input_bytes=submission.input_bytes,
            submit_id=submission.submit_id,
        )
    ]


def release(state: State, given: Release, now_ns: int) -> list[AnyEvent]:
    if given.reservation_id not in state.reservations:
        return []
    return [ReservationReleased(at_ns=now_ns, reservation_id=given.reservation_id)]


def submit(state: State, rules: Rules, given: Submit, now_ns: int) -> list[AnyEvent]:
    """Of two streams of one submission the first to end makes the job; the other gives back its room."""
    who, submission = given.who, given.submission
    held = state.reservations.get(given.reservation_id)
    if find_submitted(state, who, submission):
        return release(state, Release(reservation_id=given.reservation_id), now_ns)
    if held is not None and _admitted(held, who, submission):
        params = _params(rules, submission)
    else:
        params = _check(state, rules, who, submission, now_ns)
    return [
        Submitted(
            at_ns=now_ns,
            job_id=state.next_job_id,
            submit_id=submission.submit_id,
            owner=who.uid,
            tenant=tenant_of(who, submission),
            handler=submission.handler,
            items=submission.items,
            input_bytes=submission.input_bytes,
            input_sha256=submission.input_sha256,
            name=submission.name,
            params=params,
            priority=submission.priority,
            begin_ns=submission.begin_ns,
            deadline_ns=submission.deadline_ns,
            failures_max=submission.failures_max,
            retry_of=submission.retry_of,
            message=submission.message,
            reservation_id=given.reservation_id if held else 0,
            notify=submission.notify,
            notify_on=submission.notify_on,
            input=given.inline,
        )
    ]


def _admitted(held: Reservation, who: Who, submission: Submission) -> bool:
    return (held.owner, held.tenant, held.submit_id, held.items, held.input_bytes) == (
        who.uid,
        tenant_of(who, submission),
        submission.submit_id,
        submission.items,
        submission.input_bytes,
    )


# --- what is checked ----------------------------------------------------------------------------------------------


def _check(
    state: State, rules: Rules, who: Who, submission: Submission, now_ns: int
) -> dict[str, ParamValue]:
    """Every check there is; returns the parameters with their defaults filled in.

    Raises:
        Refused: the first that failed. The order is from the house to the detail, so that a refusal which
            the next submission would meet as well is said first.
    """
    _check_open(state, rules)
    params = _params(rules, submission)
    _check_rights(state, who, submission)
    _check_header(submission, now_ns)
    telling.check(state, who, submission.notify, submission.notify_on, now_ns)
    _check_sizes(rules, submission)
    _check_room(state, rules, submission)
    _check_tenants_quota(state, rules, tenant_of(who, submission), submission)
    if not who.admin:  # who serves others, or could raise the limits
        _check_own_quota(state, rules, who, submission, now_ns)
    return params


def _check_open(state: State, rules: Rules) -> None:
    switches = state.switches
    because = f": {switches.message}" if switches.message else ""
    if state.stopping:
        raise Refused(ErrorCode.DRAINING, "gpujobd is stopping")
    if switches.draining:
        raise Refused(ErrorCode.DRAINING, f"the queue is being drained{because}")
    if switches.disabled:
        raise Refused(ErrorCode.DISABLED, f"the queue is disabled{because}")
    if state.disk_full:
        raise Refused(ErrorCode.DISK_LOW, f"the disk is full: {state.disk_detail or policy.NO_SPACE}")
    if rules.disk_low:
        raise Refused(ErrorCode.DISK_LOW, "free space on the disk is below disk_free_bytes_min")


def _check_rights(state: State, who: Who, submission: Submission) -> None:
    tenant = tenant_of(who, submission)
    if not rights.allowed("submit", who, None):
        raise Refused(ErrorCode.FORBIDDEN, "you may not submit")
    own = who.name or str(who.uid)
    if tenant != own and tenant not in who.tenants and not who.admin:
        raise Refused(ErrorCode.FORBIDDEN, f"you may not submit as tenant {tenant}")
    check_priority(who, submission.priority)
    if submission.retry_of:
        job = state.jobs.get(submission.retry_of)
        if job is None or not rights.allowed("retry", who, job):
            raise Refused(ErrorCode.NO_SUCH_JOB, f"no job {submission.retry_of}")
        if job.state not in FINAL:
            raise Refused(
                ErrorCode.BAD_STATE, f"job {job.job_id} is {job.state}: only a final job is retried"
            )


def check_priority(who: Who, priority: Priority) -> None:
    if priority is Priority.HIGH and not (who.admin or who.high):
        raise Refused(ErrorCode.FORBIDDEN, "priority high takes an administrator; you may use up to normal")


def _check_header(submission: Submission, now_ns: int) -> None:
    """Raises: Refused(bad_input) for a header that no honest client makes, so that nothing stored is unbounded."""
    submit_id, name = submission.submit_id, submission.name
    if not (0 < len(submit_id) <= SUBMIT_ID_CHARS_MAX and submit_id.isascii() and submit_id.isprintable()):
        raise _bad_input(f"submit_id is 1 to {SUBMIT_ID_CHARS_MAX} printable ASCII characters")
    if len(name) > NAME_CHARS_MAX or not name.isprintable():
        raise _bad_input(f"a name has at most {NAME_CHARS_MAX} printable characters")
    if not _is_name(submission.tenant or "own"):
        raise _bad_input(f"a tenant's name has at most {NAME_CHARS_MAX} printable characters and no space")
    if len(submission.message) > MESSAGE_CHARS_MAX:
        raise _bad_input(f"a message has at most {MESSAGE_CHARS_MAX} characters")
    if submission.items < 1:
        raise _bad_input("the input has no items")
    if submission.input_bytes < 2 * submission.items or submission.item_bytes > submission.input_bytes:
        raise _bad_input(f"{submission.input_bytes} bytes do not hold {submission.items} items")
    if submission.item_bytes < 2:
        raise _bad_input("the longest line has at least 2 bytes: {}")
    if len(submission.input_sha256) != INPUT_SHA256_BYTES:
        raise _bad_input(f"input_sha256 has {len(submission.input_sha256)} of {INPUT_SHA256_BYTES} bytes")
    if submission.failures_max < -1 or submission.begin_ns < 0 or submission.deadline_ns < 0:
        raise _bad_input("failures_max, begin and deadline are not negative")
    if submission.deadline_ns and submission.deadline_ns <= max(now_ns, submission.begin_ns):
        raise _bad_input("the deadline is over before the job may begin")


def _is_name(text: str) -> bool:
    return len(text) <= NAME_CHARS_MAX and text.isprintable() and " " not in text


def _bad_input(message: str) -> Refused:
    return Refused(ErrorCode.BAD_INPUT, message)


def _check_sizes(rules: Rules, submission: Submission) -> None:
    """The size of this submission alone."""
    _at_most(
        ErrorCode.TOO_MANY_ITEMS,
        submission.items,
        rules.items_per_job_max,
        "the input has",
        "items, a job has",
    )
    _at_most(
        ErrorCode.INPUT_TOO_LARGE,
        submission.input_bytes,
        rules.input_bytes_max,
        "the input has",
        "bytes, an input has",
    )
    _at_most(
        ErrorCode.ITEM_TOO_LARGE,
        submission.item_bytes,
        rules.item_bytes_max,
        "the longest line has",
        "bytes, an item has",
    )


def _check_room(state: State, rules: Rules, submission: Submission) -> None:
    """What is here already, and this submission."""
    book = state.book
    _below(ErrorCode.QUEUE_FULL, book.open_jobs, rules.queued_jobs_max, "the queue holds")
    _fits(
        ErrorCode.BACKLOG_FULL,
        book.open_items,
        submission.items,
        rules.queued_items_max,
        "the queue holds",
        "items",
    )
    _fits(
        ErrorCode.SPOOL_FULL,
        book.stored_bytes,
        submission.input_bytes,
        rules.spool_bytes_max,
        "inputs and outputs take",
        "bytes",
    )


def _check_tenants_quota(state: State, rules: Rules, tenant: str, submission: Submission) -> None:
    rule = rules.tenants.get(tenant)
    if rule is None:
        return
    use, has = state.book.of_tenant.get(tenant, NO_USE), f"tenant {tenant} has"
    if rule.queued_jobs_max is not None:
        _below(ErrorCode.QUOTA, use.jobs, rule.queued_jobs_max, has)
    if rule.queued_items_max is not None:
        _fits(ErrorCode.QUOTA, use.items, submission.items, rule.queued_items_max, has, "queued items")
    if rule.spool_bytes_max is not None:
        _fits(ErrorCode.QUOTA, use.bytes, submission.input_bytes, rule.spool_bytes_max, has, STORED)


def _check_own_quota(state: State, rules: Rules, who: Who, submission: Submission, now_ns: int) -> None:
    """O(1): the book counts along, and 15,000 submissions a second come by here."""
    use = state.book.of_uid.get(who.uid, NO_USE)
    _below(ErrorCode.QUOTA, use.jobs, rules.jobs_per_uid_max, "you have")
    _fits(ErrorCode.QUOTA, use.items, submission.items, rules.items_per_uid_max, "you have", "queued items")
    _fits(ErrorCode.QUOTA, use.bytes, submission.input_bytes, rules.bytes_per_uid_max, "you have", STORED)
    _check_rate(state, rules.submissions_per_minute_max, who, now_ns)


def _check_rate(state: State, limit: int, who: Who, now_ns: int) -> None:
    now, before = state.arrivals.counted(who.uid, now_ns)
    if now + before < limit:
        return
    gone = now_ns % MINUTE_NS / MINUTE_NS  # of this minute; what is left of it counts of the one before
    counted = now + before * (1 - gone)
    if counted > limit - 1:
        current, wait_s = math.ceil(counted), math.ceil(60 * _wait(limit - 1, now, before, gone))
        message = f"you submitted {current} jobs in a minute, allowed are {limit}: again in {wait_s} s"
        raise Refused(ErrorCode.QUOTA, message, limit=limit, current=current, retry_after_s=wait_s)


def _wait(most: int, now: int, before: int, gone: float) -> float:
    """Minutes until no more than `most` count, with nothing more submitted."""
    if now <= most:
        return (1 - (most - now) / before) - gone
    return (1 - gone) + (1 - most / now)


def submitted_lately(state: State, uid: int, now_ns: int) -> int:
    """Submissions of the last minute, as the limit counts them."""
    now, before = state.arrivals.counted(uid, now_ns)
    return math.ceil(now + before * (1 - now_ns % MINUTE_NS / MINUTE_NS))


def _at_most(code: ErrorCode, current: int, limit: int, has: str, noun: str) -> None:
    if current > limit:
        raise Refused(code, f"{has} {current} {noun} at most {limit}", limit=limit, current=current)


def _below(code: ErrorCode, current: int, limit: int, has: str) -> None:
    if current >= limit:
        message = f"{has} {current} of {limit} jobs queued, running or paused"
        raise Refused(code, message, limit=limit, current=current)


def _fits(code: ErrorCode, current: int, more: int, limit: int, has: str, noun: str) -> None:
    if current + more > limit:
        message = f"{has} {current} of {limit} {noun}, too many for {more} more"
        raise Refused(code, message, limit=limit, current=current)


# --- parameters -----------------------------------------------------------------------------------------------------


def _params(rules: Rules, submission: Submission) -> dict[str, ParamValue]:
    """What the job will be called with: what was given, checked, and the defaults.

    Raises:
        Refused: unknown_handler, bad_params.
    """
    handler = rules.handlers.get(submission.handler)
    if handler is None:
        known = ", ".join(sorted(rules.handlers)) or "none"
        raise Refused(
            ErrorCode.UNKNOWN_HANDLER, f"no handler {submission.handler[:NAME_CHARS_MAX]}; there are: {known}"
        )
    if not handler.job_params and not submission.params:
        return NO_PARAMS
    for name in submission.params:
        if name not in handler.job_params:
            known = ", ".join(sorted(handler.job_params)) or "none"
            raise _bad_params(
                f"{submission.handler} has no parameter {name[:NAME_CHARS_MAX]}; it has: {known}"
            )
    params: dict[str, ParamValue] = {}
    for name, rule in handler.job_params.items():
        if name in submission.params:
            params[name] = _param(name, rule, submission.params[name])
        elif rule.default is not None:
            params[name] = rule.default
    return params


def _param(name: str, rule: ParamRule, value: ParamValue) -> ParamValue:
    if rule.type == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= INT64_MAX else math.inf
    if type(value).__name__ != rule.type:
        raise _bad_params(f"{name} takes {rule.type}, not {type(value).__name__}")
    if rule.choices and value not in rule.choices:
        raise _bad_params(f"{name} is one of {', '.join(map(str, rule.choices))}")
    if isinstance(value, str):
        if len(value) > PARAM_CHARS_MAX:
            raise _bad_params(f"{name} has {len(value)} characters, allowed are {PARAM_CHARS_MAX}")
    elif not math.isfinite(value) or (rule.type == "int" and abs(value) > INT64_MAX):
        raise _bad_params(f"{name} is not a finite number of at most 64 bits")
    elif (rule.min is not None and value < rule.min) or (rule.max is not None and value > rule.max):
        raise _bad_params(f"{name} is {value}, allowed are {_bounds(rule)}")
    return value


def _bounds(rule: ParamRule) -> str:
    if rule.min is None:
        return f"at most {rule.max:g}"
    return f"at least {rule.min:g}" if rule.max is None else f"{rule.min:g} to {rule.max:g}"


def _bad_params(message: str) -> Refused:
    return Refused(ErrorCode.BAD_PARAMS, message)
