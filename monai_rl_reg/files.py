"""Files that appear whole, and folders whose files appear together: a kill leaves the old ones or the new ones."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from monai_rl_reg.errors import InputError

HEADERS = (".mhd", ".nhdr", ".hdr", ".img")
"""Suffixes of images in two files."""
RENAME_EXCHANGE = 2  # of Linux's renameat2
AT_FDCWD = -100
UMASK = os.umask(0)
"""What new files may not be; read once, for to read it is to change it, for all threads."""
os.umask(UMASK)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, with its suffix; moved onto it when all went well, removed if not.

    Raises:
        InputError: if the folder cannot be made or written to.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.name)
    except OSError as error:
        raise InputError(f"output {path}: expected a folder that can be written to, found: {error.strerror}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~UMASK)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"output {path}: expected room to write it, found: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def expect_folder(folder: str | Path) -> None:
    """See whether a folder is there, or can be made, and written to, without making it.

    Raises:
        InputError: if not.
    """
    there = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        found = "one that may not be written to" if there.is_dir() else f"the file {there}"
        raise InputError(f"output {folder}: expected a folder that can be written to, found {found}")


def check_writable(folder: str | Path, name: str = ".writable") -> None:
    """Make a folder, and see that files can be written into it, by one of this name, which goes again.

    Raises:
        InputError: if not.
    """
    with replacing(Path(folder) / name):
        pass
    (Path(folder) / name).unlink()


@contextmanager
def replacing_folder(folder: str | Path, ours: Set[str]) -> Iterator[Path]:
    """Yield an empty folder to write files into; they take the place of ``folder``'s when all went well.

    A folder that is not there yet appears by one rename; one that is there is exchanged for the new one in one step
    (Linux), or by two renames, and its permissions are kept. What else lies in it stays. Where folders cannot be
    renamed (a mount point, the working directory, a parent that may not be written to) the files are moved in one by
    one.

    Args:
        folder: the output folder.
        ours: names of all files that a run may leave; those that this run did not write are removed.

    Raises:
        InputError: if the folder cannot be made or written to.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(0, "a file of this name")
        inside = folder.is_dir() and (folder.is_mount() or folder.resolve() == Path.cwd())
        inside = inside or (folder.is_dir() and not os.access(folder.resolve().parent, os.W_OK | os.X_OK))
        home = folder if inside else folder.resolve().parent
        staging = Path(tempfile.mkdtemp(dir=home, prefix=f".{folder.resolve().name}."))
        staging.chmod(0o777 & ~UMASK)
        if folder.is_dir() and not inside:
            _take_after(staging, folder)
        number = staging.stat().st_ino
    except OSError as error:
        raise InputError(
            f"output {folder}: expected a folder that can be written to, found: {error.strerror}"
        ) from error
    try:
        yield staging
        if inside:
            _move_in(staging, folder, ours)
        else:
            _swap(staging, folder.resolve(), ours)
    except OSError as error:
        raise InputError(f"output {folder}: expected room to write it, found: {error.strerror or error}") from error
    finally:
        if staging.exists() and staging.stat().st_ino != number:  # exchanged: it is the folder of before
            _give_back(staging, folder.resolve(), ours)
        else:
            shutil.rmtree(staging, ignore_errors=True)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder; where it is not there yet, have it filled, under another name until it is complete.

    Raises:
        InputError: if it cannot be made or written to.
    """
    folder = Path(os.path.normpath(folder))
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            inside = Path(temporary) / folder.name
            inside.mkdir()
            make(inside)
            inside.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise InputError(f"output {folder}: expected room to write it, found: {error}") from error
    return folder


def file_stamp(path: str | Path) -> dict[str, Any]:
    """Return a file's full path, its size, and when it was last changed; the path alone if it is none.

    Of a folder, such as a DICOM series, its files count, all together; also of one that is no path but a series in it.
    Of a header, whose voxels are in a file beside it, so does what has its name and another suffix.
    """
    path = Path(path).resolve()
    there = path if path.exists() or not path.parent.is_dir() or not path.suffix[1:].isdigit() else path.parent
    if not there.exists():
        return {"path": str(path)}
    found = [file.stat() for file in there.iterdir()] if there.is_dir() else []
    if there.suffix in HEADERS:
        found += [file.stat() for file in there.parent.glob(f"{glob.escape(there.stem)}.*")]
    found.append(there.stat())
    size, changed = sum(status.st_size for status in found), max(status.st_mtime_ns for status in found)
    return {"path": str(path), "size": size, "changed": changed}


def drop_leftovers(folder: Path) -> None:
    """Remove what a run that was killed had written for this folder and not put in its place."""
    for staging in folder.parent.glob(f".{glob.escape(folder.name)}.{'?' * 8}"):
        shutil.rmtree(staging, ignore_errors=True)


def _take_after(staging: Path, folder: Path) -> None:
    """Give a folder the permissions of the one whose place it takes, as far as the user may."""
    with contextlib.suppress(OSError):
        os.chown(staging, -1, folder.stat().st_gid)
    with contextlib.suppress(OSError):
        shutil.copystat(folder, staging)


def _swap(staging: Path, folder: Path, ours: Set[str]) -> None:
    if not folder.exists():
        staging.rename(folder)
        return
    foreign = [entry.name for entry in folder.iterdir() if entry.name not in ours]
    for name in foreign:  # a hard link now, so that such a file is in its place at every moment
        with contextlib.suppress(OSError):
            os.link(folder / name, staging / name, follow_symlinks=False)
    _exchange(staging, folder)  # from here on ``staging`` has what was there before
    moved = []
    try:
        for name in foreign:
            if not os.path.lexists(folder / name):
                (staging / name).rename(folder / name)
                moved.append(name)
    except OSError:  # a mount point, or another owner's: all back, and the files one by one
        for name in moved:
            (folder / name).rename(staging / name)
        _exchange(staging, folder)
        _move_in(staging, folder, ours)


def _give_back(old: Path, folder: Path, ours: Set[str]) -> None:
    """Empty the folder of before: what is not ours and not in its place yet goes there, or stays."""
    for entry in list(old.iterdir()):
        with contextlib.suppress(OSError):
            if entry.name not in ours and not os.path.lexists(folder / entry.name):
                entry.rename(folder / entry.name)
            else:
                entry.unlink()
    with contextlib.suppress(OSError):
        old.rmdir()


def _exchange(a: Path, b: Path) -> None:
    """Exchange two folders of one parent: in one step where the system can, else by renames."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None, use_errno=True)
        paths = [os.fsencode(path) for path in (a, b)]
        if libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
            return
    aside = a.with_name(f"{a.name}.old")
    b.rename(aside)
    a.rename(b)
    aside.rename(a)


def _move_in(staging: Path, folder: Path, ours: Set[str]) -> None:
    written = {file.name for file in staging.iterdir()}
    for name in sorted(written):
        (staging / name).replace(folder / name)
    for name in ours - written:
        (folder / name).unlink(missing_ok=True)
