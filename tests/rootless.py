"""Running something as a user without any privilege, where tests run as root and /dev/fuse is root's alone.

In a mount namespace of its own: a /dev/fuse that everybody may open, the directories that the program needs reachable
for everybody, a name for the user, and subordinate ids if wanted.
Used as a program: ``python tests/rootless.py fuse|no-fuse IDS PATH... -- COMMAND...``.
"""

import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
UID = 64321  # a user whom no machine has
NAME = "rehearser"
SUBORDINATE = (700_000_000, 65536)
_PLACE = Path("/mnt")
FUSE_DEVICE = os.makedev(10, 229)


def as_plain_user(
    command: Sequence[str], *reachable: Path, subordinate_ids: bool = False, fuse: bool = True
) -> list[str]:
    """The command line that runs ``command`` as UID, to whom ``reachable`` is made so (owner and mode stay)."""
    needed = [ROOT, Path(sys.prefix), Path(sys.base_prefix), *reachable]
    ids = ":".join(map(str, SUBORDINATE)) if subordinate_ids else "none"
    return [sys.executable, __file__, "fuse" if fuse else "no-fuse", ids, *map(str, needed), "--", *command]


def _main() -> None:
    separator = sys.argv.index("--")
    mode, ids = (0o666 if sys.argv[1] == "fuse" else 0o600), sys.argv[2]
    command = sys.argv[separator + 1 :]
    namespaces.unshare(Namespace.MOUNT)
    mounts.make_private()
    _make_reachable([Path(word).resolve() for word in sys.argv[3:separator]])
    os.chdir(Path.cwd())  # through what was mounted
    _mount_tmpfs(_PLACE)
    os.mknod(_PLACE / "fuse", stat.S_IFCHR | mode, FUSE_DEVICE)
    (_PLACE / "fuse").chmod(mode)
    _cover(Path("/dev/fuse"), _PLACE / "fuse")
    _append("/etc/passwd", f"{NAME}:x:{UID}:{UID}::/:/bin/sh")
    _append("/etc/group", f"{NAME}:x:{UID}:")
    for file in ("/etc/subuid", "/etc/subgid"):
        _append(file, f"{NAME}:{ids}" if ids != "none" else "# none")
    runtime = _PLACE / "run"
    runtime.mkdir(mode=0o700)
    os.chown(runtime, UID, UID)
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)  # as a login gives one; this one vanishes with the namespace
    for fd in (0, 1, 2):
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            os.fchown(fd, UID, UID)  # as pipes of his own would be
    os.setgroups([])
    os.setresgid(UID, UID, UID)
    os.setresuid(UID, UID, UID)
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


def _append(file: str, line: str) -> None:
    copy = _PLACE / Path(file).name
    copy.write_text(f"{Path(file).read_text()}{line}\n")
    copy.chmod(0o644)
    _cover(Path(file), copy)


def _cover(path: Path, by: Path) -> None:
    tree = mounts.clone(by, recursive=False)
    mounts.attach(tree, path)
    os.close(tree)


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
