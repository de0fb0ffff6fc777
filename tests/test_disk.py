"""The real disk's calls, where there is more to them than the call."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpujobd.disk import Disk, make_folders


def test_the_name_of_every_folder_that_is_made_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(Disk, "fsync_dir", lambda disk, folder: synced.append(folder))
    make_folders(tmp_path / "a" / "b" / "c")
    assert sorted(synced) == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert (tmp_path / "a" / "b" / "c").stat().st_mode & 0o777 == 0o700
    synced.clear()
    make_folders(tmp_path / "a" / "b" / "c")  # which somebody else may have made, and not synced
    assert synced == [str(tmp_path / "a" / "b")]
