"""What the agent makes in the staged devtmpfs and sysfs for devices that come and go.

A step is a list: ``directory PATH``, ``file PATH CONTENT MODE``, ``link PATH TARGET``, ``node PATH SOURCE`` (a staged
file that is mounted on it) or ``gone PATH``. Directories on the way are made. What is there already is replaced.
"""

import os
import shutil
import stat
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ipe_emu.linux import mounts


def furnish(root: Path, steps: Sequence[Sequence[Any]], as_owner: Callable[[], AbstractContextManager[None]]) -> None:
    """Carry out steps below ``root``, whose files belong to whom ``as_owner`` makes of us. OSError from what fails."""
    for kind, path, *rest in steps:
        place = root / path
        if kind in {"gone", "link"}:
            _remove(place, as_owner)
        with as_owner():
            _make(kind, place, rest)
        if kind == "node":
            tree = mounts.clone(Path(rest[0]), recursive=False)
            try:
                mounts.attach(tree, place)
            finally:
                os.close(tree)


def _make(kind: str, place: Path, rest: list[Any]) -> None:
    if kind == "gone":
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    match kind, rest:
        case "directory", []:
            place.mkdir(exist_ok=True)
        case "file", [content, mode]:
            place.unlink(missing_ok=True)
            place.write_text(content)
            place.chmod(mode)
        case "link", [target]:
            place.symlink_to(target)
        case "node", [_source]:
            place.touch()
        case _:
            raise ValueError(f"no step {kind!r}")


def _remove(place: Path, as_owner: Callable[[], AbstractContextManager[None]]) -> None:
    try:
        mode = place.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
        mounts.detach(os.fsencode(place))
    with as_owner():
        if stat.S_ISDIR(mode):
            shutil.rmtree(place)
        else:
            place.unlink()
