import errno
from pathlib import Path

import pytest

from moesaic.convert.folder import check_is_new, folder_in_progress
from moesaic.errors import ConfigError, ConversionError, FolderInUseError


def test_the_folder_takes_its_name_when_all_of_it_is_written(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    (tmp_path / "deep" / ".writing-out").mkdir(parents=True)  # of a process that was killed
    (tmp_path / "deep" / ".writing-out" / "left").touch()
    with folder_in_progress(out) as folder:
        (folder / "file").touch()
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(ConfigError, match=r"out exists; .*; name another"):
        check_is_new(out)


def test_what_it_holds_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, synced = tmp_path / "out", []
    monkeypatch.setattr("moesaic.convert.folder.sync", lambda path: synced.append((path.name, out.exists())))
    with folder_in_progress(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").touch()
    assert sorted(synced[:-1]) == [(".writing-out", False), ("file", False), ("inner", False)]
    assert synced[-1] == (tmp_path.name, True)


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError("no space left"), ConversionError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_whatever_goes_wrong_leaves_nothing(tmp_path: Path, error: BaseException, raised: type[BaseException]) -> None:
    with pytest.raises(raised), folder_in_progress(tmp_path / "out") as folder:
        (folder / "file").touch()
        raise error
    assert not list(tmp_path.iterdir())
    with pytest.raises(raised), folder_in_progress(tmp_path / "made" / "for it" / "out"):
        raise error
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").mkdir()
    with pytest.raises(raised), folder_in_progress(tmp_path / "there" / "made" / "out"):
        raise error
    assert not list((tmp_path / "there").iterdir())


def test_a_link_where_the_folder_is_written_first_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / ".writing-out").symlink_to(tmp_path / "mine")
    with (
        pytest.raises(ConversionError, match=r"a link has the name .*writing-out'; "),
        folder_in_progress(tmp_path / "out"),
    ):
        raise AssertionError
    assert (tmp_path / ".writing-out").is_symlink() and (tmp_path / "mine" / "file").exists()


def test_one_process_at_a_time_makes_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with folder_in_progress(out) as folder:
        (folder / "file").touch()
        message = r"/out is being written by process \d+; .*; wait"
        with pytest.raises(FolderInUseError, match=message), folder_in_progress(out):
            raise AssertionError
        assert (folder / "file").exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    # Two that began one after the other: the first to end has its folder, the second says so.
    with pytest.raises(ConversionError, match="out could not be written"), folder_in_progress(out) as folder:
        (folder / "other").touch()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.EROFS, "Read-only file system"), "make its file system writable"),
        (OSError(errno.ENOSPC, "No space left on device"), "free some disk space"),
    ],
)
def test_a_folder_that_cannot_be_written_is_told_with_what_helps(tmp_path: Path, error: OSError, remedy: str) -> None:
    with (
        pytest.raises(ConversionError, match=rf"{error.strerror}; .*; {remedy}, or name"),
        folder_in_progress(tmp_path / "out"),
    ):
        raise error
