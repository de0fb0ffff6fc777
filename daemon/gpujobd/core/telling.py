"""Whom a job tells of what becomes of it: is a notifier here, and may it be asked for that?

Rule 1: the daemon itself tells nobody. It keeps what a submission asks for, and holds it to what the notifier said that
it can reach, so that the no is said at the door and not after the night.
Rule 2: a notifier that left counts as here for GONE_NS more: it is being started anew, or upgraded.
Rule 3: this is a courtesy to whoever submits. What is really sent, the notifier decides, by its own configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from gpujobd.core import rights
from gpujobd.core.events import AnyEvent, NotifierAttached, NotifierLeft
from gpujobd.core.inputs import Attend, Who
from gpujobd.core.model import MINUTE_NS, Notifier, State
from gpujobd.core.refused import Refused
from gpujobd.protocol import (
    ATTEND_WORD_CHARS_MAX,
    ATTEND_WORDS_MAX,
    NOBODY,
    NOTIFY_TARGET_CHARS_MAX,
    NOTIFY_TARGETS_MAX,
    ErrorCode,
    NotifyOn,
    covers,
    is_occasion,
)

GONE_NS: Final = 10 * MINUTE_NS
OCCASIONS_MAX: Final = 16
TOLD_MAX: Final = 12  # of what is allowed, in one refusal
LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
HOST: Final = rf"{LABEL}(?:\.{LABEL})*"
WORD: Final = r"[A-Za-z0-9!#$&'*+/=^_`{|}~-]+"
ADDRESS: Final = re.compile(rf"(?=.{{1,64}}@){WORD}(?:\.{WORD})*@({HOST})", re.ASCII)
URL: Final = re.compile(
    rf"https?://({HOST}\.?|\[[0-9A-Fa-f:.]+\])(?::([0-9]{{1,5}}))?(?:[/?][^\\#]*)?", re.ASCII | re.IGNORECASE
)
PORT_MAX: Final = 65_535


# --- the notifier -------------------------------------------------------------------------------------------------


def attend(state: State, given: Attend, now_ns: int) -> list[AnyEvent]:
    if not rights.allowed("attend", given.who, None):
        raise Refused(ErrorCode.FORBIDDEN, "attend takes an observer or an administrator")
    for words in (given.names, given.admin_names, given.url_hosts, given.mail_domains):
        _check_words(words)
    said = Notifier(
        names=given.names,
        admin_names=given.admin_names,
        url_hosts=given.url_hosts,
        mail_domains=given.mail_domains,
    )
    if said == state.notifier:
        return []
    return [
        NotifierAttached(
            at_ns=now_ns,
            by=given.who.uid,
            names=given.names,
            admin_names=given.admin_names,
            url_hosts=given.url_hosts,
            mail_domains=given.mail_domains,
        )
    ]


def _check_words(words: tuple[str, ...]) -> None:
    """So that the event fits a frame, and a refusal that quotes them a line."""
    if len(words) > ATTEND_WORDS_MAX:
        raise Refused(
            ErrorCode.BAD_REQUEST,
            f"{len(words)} words in one list, allowed are {ATTEND_WORDS_MAX}",
            limit=ATTEND_WORDS_MAX,
            current=len(words),
        )
    for word in words:
        if not (0 < len(word) <= ATTEND_WORD_CHARS_MAX and _is_plain(word)):
            message = f"{word[:60]!r} is not 1 to {ATTEND_WORD_CHARS_MAX} printable ASCII characters"
            raise Refused(ErrorCode.BAD_REQUEST, message)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def leave(state: State, now_ns: int) -> list[AnyEvent]:
    if state.notifier is None or state.notifier.left_ns:
        return []
    return [NotifierLeft(at_ns=now_ns)]


# --- the door -----------------------------------------------------------------------------------------------------


def check(state: State, who: Who, notify: tuple[str, ...], notify_on: tuple[str, ...], now_ns: int) -> None:
    """Raises: Refused: bad_notify, no_notifier."""
    if not notify and not notify_on:  # nearly every submission
        return
    _check_occasions(notify_on)
    _check_form(notify)
    if notify and notify != (NOBODY,):
        notifier = _here(state, now_ns)
        for target in notify:
            _check_target(notifier, who, target)


def _check_occasions(notify_on: tuple[str, ...]) -> None:
    if len(notify_on) > OCCASIONS_MAX:
        raise _bad(f"{len(notify_on)} occasions, allowed are {OCCASIONS_MAX}")
    for word in notify_on:
        if not is_occasion(word):
            known = ", ".join(NotifyOn)
            raise _bad(
                f"{word[:60]!r} is no occasion to tell; there are: {known}, progress=1% to progress=99%"
            )


def _check_form(notify: tuple[str, ...]) -> None:
    if len(notify) > NOTIFY_TARGETS_MAX:
        raise Refused(
            ErrorCode.BAD_NOTIFY,
            f"{len(notify)} targets to tell, a job has at most {NOTIFY_TARGETS_MAX}",
            limit=NOTIFY_TARGETS_MAX,
            current=len(notify),
        )
    for target in notify:
        if len(target) > NOTIFY_TARGET_CHARS_MAX:
            raise _bad(f"a target has {len(target)} characters, allowed are {NOTIFY_TARGET_CHARS_MAX}")
        if not target or not _is_plain(target):
            raise _bad(f"the target {target[:60]!r} is not printable ASCII without spaces")
        if target == NOBODY and len(notify) > 1:
            raise _bad(f"{NOBODY} tells nobody, and stands alone")


def _here(state: State, now_ns: int) -> Notifier:
    notifier = state.notifier
    if notifier is None:
        raise Refused(ErrorCode.NO_NOTIFIER, "no notifier has ever been here: gpujobd-notify is not set up")
    # either way: a clock that was put back meanwhile must not keep it here for a year
    if notifier.left_ns and abs(now_ns - notifier.left_ns) > GONE_NS:
        gone = max(0, now_ns - notifier.left_ns) // MINUTE_NS
        message = f"the notifier has been gone for {gone} minutes: gpujobd-notify does not run"
        raise Refused(ErrorCode.NO_NOTIFIER, message)
    return notifier


def _check_target(notifier: Notifier, who: Who, target: str) -> None:
    scheme, colon, rest = target.partition(":")
    if not colon:
        _check_name(notifier, who, target)
    elif scheme.lower() == "mailto":
        _check_mail(notifier, rest)
    elif scheme.lower() in ("http", "https"):
        _check_url(notifier, target)
    else:
        raise _bad(f"{target} is neither an endpoint's name, nor http:, https: or mailto:")


def _check_name(notifier: Notifier, who: Who, name: str) -> None:
    if name in notifier.names or (who.admin and name in notifier.admin_names):
        return
    if name in notifier.admin_names:
        raise _bad(f"only administrators may name {name}")
    mine = (*notifier.names, *(notifier.admin_names if who.admin else ()))
    raise _bad(f"the notifier has no endpoint {name}; there are: {_some(mine)}")


def _check_mail(notifier: Notifier, address: str) -> None:
    found = ADDRESS.fullmatch(address)
    if not found:
        raise _bad(f"{address} is not one address, such as alice@example.org")
    _check_host(found[1], notifier.mail_domains, "mail goes")


def _check_url(notifier: Notifier, url: str) -> None:
    """No URL that somebody could read otherwise, with a backslash for a slash, and find another host in."""
    found = URL.fullmatch(url)
    if not found or int(found[2] or 0) > PORT_MAX:
        raise _bad(f"{url} is no https://HOST/..., without a name or a password in it")
    _check_host(found[1].strip("[]"), notifier.url_hosts, "webhooks go")


def _check_host(host: str, patterns: tuple[str, ...], what: str) -> None:
    if not any(covers(pattern, host) for pattern in patterns):
        raise _bad(f"{what} to {_some(patterns)}, not to {host}")


def _some(words: Iterable[str]) -> str:
    """As many as a line of a refusal bears."""
    every = sorted(words)
    return (
        ", ".join(every[:TOLD_MAX]) + (f" and {len(every) - TOLD_MAX} more" * (len(every) > TOLD_MAX))
        or "none"
    )


def _bad(message: str) -> Refused:
    return Refused(ErrorCode.BAD_NOTIFY, message)
