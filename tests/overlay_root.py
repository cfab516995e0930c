"""Running something where the root directory is an overlay, as in a container: its files cannot be given to other ids.

Used as a program by root: ``python tests/overlay_root.py DIRECTORY COMMAND...``; DIRECTORY is for what gets written.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def on_overlay(directory: Path, command: list[str]) -> list[str]:
    """The command line that runs ``command`` with an overlay over the root directory."""
    return [sys.executable, __file__, str(directory), *command]


def _main() -> None:
    directory, command = Path(sys.argv[1]), sys.argv[2:]
    here = Path.cwd()
    for name in ("upper", "work", "root"):
        (directory / name).mkdir()
    namespaces.unshare(Namespace.MOUNT)
    mounts.make_private()
    options = {b"lowerdir": b"/", b"upperdir": bytes(directory / "upper"), b"workdir": bytes(directory / "work")}
    overlay = mounts.new_filesystem(b"overlay", dict(options))
    # An overlay shows one file system; on many machines these are others.
    separate = [path for path in map(Path, ("/proc", "/sys", "/dev", "/run", "/tmp")) if path.is_mount()]
    others = {path: mounts.clone(path, recursive=True) for path in separate}
    mounts.attach(overlay, directory / "root")
    mounts.pivot_root_into(directory / "root")
    for path, tree in others.items():
        mounts.attach(tree, path)
    os.chdir(here)
    os.execvp(command[0], command)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from ipe_emu.linux import mounts, namespaces
    from ipe_emu.linux.namespaces import Namespace

    _main()
