"""Running something as a user without any privilege, where tests run as root and /dev/fuse is root's alone.

In a mount namespace of its own: a /dev/fuse that everybody may open, and the directories that the program needs
reachable for everybody. Used as a program: ``python tests/rootless.py UID PATH... -- COMMAND...``.
"""

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
UID = 64321  # a user whom no machine has
FUSE_DEVICE = os.makedev(10, 229)


def as_plain_user(command: Sequence[str], *reachable: Path) -> list[str]:
    """The command line that runs ``command`` as UID, to whom ``reachable`` is made so (owner and mode stay)."""
    needed = [ROOT, Path(sys.prefix), Path(sys.base_prefix), *reachable]
    return [sys.executable, __file__, str(UID), *map(str, needed), "--", *command]


def _main() -> None:
    separator = sys.argv.index("--")
    uid, command = int(sys.argv[1]), sys.argv[separator + 1 :]
    namespaces.unshare(Namespace.MOUNT)
    mounts.make_private()
    _make_reachable([Path(word).resolve() for word in sys.argv[2:separator]])
    _open_fuse_to_all()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    assert not capabilities.effective()
    os.execvp(command[0], command)


def _make_reachable(paths: list[Path]) -> None:
    blocked: dict[Path, set[Path]] = {}
    for path in paths:
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & stat.S_IXOTH:
                blocked.setdefault(parent, set()).add(path)
                break
    for parent, needed in blocked.items():
        trees = {path: mounts.clone(path, recursive=True) for path in sorted(needed)}
        _mount_tmpfs(parent)
        for path, tree in trees.items():
            path.mkdir(parents=True, exist_ok=True)
            mounts.attach(tree, path)
            os.close(tree)


def _open_fuse_to_all() -> None:
    place = Path("/mnt")
    _mount_tmpfs(place)
    os.mknod(place / "fuse", stat.S_IFCHR | 0o666, FUSE_DEVICE)
    (place / "fuse").chmod(0o666)
    node = mounts.clone(place / "fuse", recursive=False)
    mounts.attach(node, Path("/dev/fuse"))
    os.close(node)


def _mount_tmpfs(path: Path) -> None:
    tmpfs = mounts.new_filesystem(b"tmpfs", {b"mode": b"755"})
    mounts.attach(tmpfs, path)
    os.close(tmpfs)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from ipe_emu.linux import capabilities, mounts, namespaces
    from ipe_emu.linux.namespaces import Namespace

    os.umask(0o022)
    _main()
else:
    from ipe_emu.linux import capabilities, mounts, namespaces
    from ipe_emu.linux.namespaces import Namespace
