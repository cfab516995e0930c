"""Do one recorded step with system calls of this process. The standard library alone, so that it starts quickly.

usage: python acting.py ROOT STEP     (STEP is JSON, as is what is printed)
"""

# ruff: noqa: PTH101,PTH102,PTH104,PTH106,PTH108,PTH208,PTH211 - system calls as they are
# Each recorded step is one system call; pathlib would make several.

import base64
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Step = dict[str, Any]

OPEN_FLAGS = {
    "O_WRONLY": os.O_WRONLY,
    "O_WRONLY|O_CREAT|O_TRUNC": os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    "O_WRONLY|O_APPEND": os.O_WRONLY | os.O_APPEND,
}


def failed(error: OSError) -> Step:
    return {"error": errno.errorcode.get(error.errno or 0, str(error.errno))}


def encoded(data: bytes) -> Step:
    return {"data": base64.b64encode(data).decode()}


class Actor:
    """Does the recorded steps in this process."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.descriptors: dict[str, int] = {}

    def path(self, step: Step, key: str = "path") -> str:
        return str(self.root / step[key])

    def act(self, step: Step) -> Any:
        name = step["op"]
        try:
            if name.startswith("fd_"):
                return self.on_descriptor(name, step)
            method: Callable[[Step], Any] | None = getattr(self, f"do_{name}", None)
            if method is not None:
                return method(step)
            self.change(name, step)
        except OSError as error:
            return failed(error)
        return {"ok": 0}

    def do_write(self, step: Step) -> Any:
        flags = OPEN_FLAGS[step["open"]] if "open" in step else step["flags"]
        try:
            fd = os.open(self.path(step), flags, 0o666)
        except OSError as error:
            return failed(error) | {"at": "open"}
        results = []
        for data in step["writes"]:
            try:
                results.append({"ok": os.write(fd, base64.b64decode(data))})
            except OSError as error:
                results.append(failed(error))
        os.close(fd)
        return results

    def do_read(self, step: Step) -> Any:
        try:
            fd = os.open(self.path(step), os.O_RDONLY)
        except OSError as error:
            return failed(error) | {"at": "open"}
        try:
            data = b""
            while piece := os.read(fd, step["chunk"]):
                data += piece
            return encoded(data)
        finally:
            os.close(fd)

    def do_pread(self, step: Step) -> Any:
        try:
            fd = os.open(self.path(step), os.O_RDONLY)
        except OSError:
            return {"error": "EBADF"}
        try:
            return encoded(os.pread(fd, step["length"], step["offset"]))
        finally:
            os.close(fd)

    def do_open(self, step: Step) -> Any:
        os.close(os.open(self.path(step), step["flags"], 0o644))
        return {"ok": 0}

    def do_list(self, step: Step) -> Any:
        return {"names": sorted(os.listdir(self.path(step)))}

    def do_stat(self, step: Step) -> Any:
        st = os.lstat(self.path(step))
        return {
            "mode": f"{st.st_mode:o}",
            "size": str(st.st_size),
            "nlink": str(st.st_nlink),
            "uid": str(st.st_uid),
            "gid": str(st.st_gid),
            "blksize": str(st.st_blksize),
            "blocks": str(st.st_blocks),
        }

    def on_descriptor(self, name: str, step: Step) -> Any:
        if name == "fd_open":
            fd = os.open(self.path(step), step["flags"])
            if step["fd"] in self.descriptors:
                os.close(self.descriptors[step["fd"]])
            self.descriptors[step["fd"]] = fd
            return {"ok": 0}
        fd = self.descriptors.get(step["fd"], 987654)
        if name == "fd_write":
            return {"ok": os.write(fd, base64.b64decode(step["data"]))}
        if name == "fd_read":
            return encoded(os.read(fd, step["length"]))
        if name == "fd_seek":
            return {"ok": os.lseek(fd, step["offset"], os.SEEK_SET)}
        assert name == "fd_close", name
        self.descriptors.pop(step["fd"], None)
        os.close(fd)
        return {"ok": 0}

    def change(self, name: str, step: Step) -> None:
        path = self.path(step)
        if name.startswith("access_"):
            if not os.access(path, {"r": os.R_OK, "w": os.W_OK, "x": os.X_OK}[name[-1]]):
                raise OSError(errno.EACCES if os.path.lexists(path) else errno.ENOENT, "access")
            return
        {
            "mkdir": lambda: os.mkdir(path, 0o755),
            "rmdir": lambda: os.rmdir(path),
            "unlink": lambda: os.unlink(path),
            "chmod": lambda: os.chmod(path, 0o777),
            "chown": lambda: os.chown(path, 1000, 1000),
            "truncate": lambda: os.truncate(path, 0),
            "truncate5": lambda: os.truncate(path, 5),
            "symlink": lambda: os.symlink("x", path),
            "mknod": lambda: os.mknod(path, 0o100644),
            "utime": lambda: os.utime(path),
            "creat": lambda: os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)),
            "rename": lambda: os.rename(path, self.path(step, "to")),
            "link": lambda: os.link(path, self.path(step, "to")),
        }[name]()


if __name__ == "__main__":
    print(json.dumps(Actor(Path(sys.argv[1])).act(json.loads(sys.argv[2]))))
