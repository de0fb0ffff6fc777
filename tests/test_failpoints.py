"""The places where the fault suite lets processes die are named by the code: a name that is gone is found out here."""

from __future__ import annotations

import pytest
from failpoints import FAILPOINTS
from mortal import locate


@pytest.mark.parametrize("place", sorted({point.at.partition(":")[0] for point in FAILPOINTS}))
def test_a_place_to_die_at_is_in_the_code(place: str) -> None:
    owner, name = locate(place)
    assert callable(getattr(owner, name))


def test_a_place_that_is_not_there_is_said_to_be_gone() -> None:
    for place in (
        "gpujobd.journal.Journal.renamed",
        "gpujobd.journal.Renamed.append",
        "gpujobd.renamed.append",
    ):
        with pytest.raises(LookupError, match="needs its new name"):
            locate(place)


def test_there_are_more_than_forty_places_and_none_is_named_twice() -> None:
    names = [point.at for point in FAILPOINTS]
    assert len(names) == len(set(names)) >= 60
    assert all(name.endswith((":before", ":after")) for name in names)
