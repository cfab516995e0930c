"""Random sequences of calls on a few files of a file system with fs-verity: sealing, opening, cutting, replacing them.

Runs as a program of its own, with fsverity_steps.py beside it: ``fsverity_sequences.py DIRECTORY SIGNATURES COUNT``.
Prints a line of JSON for each sequence, which depends on its number alone: every call, and what came of it.
"""

import base64
import ctypes
import hashlib
import json
import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.exec_hook import fsverity_steps as steps
else:
    import fsverity_steps as steps

CALLS = 25
NAMES = ("a", "b", "c")
CONTENTS = (b"x\n", b"", steps.SIGNED, bytes(range(256)) * 40, b"z" * 4097)
_libc = ctypes.CDLL(None, use_errno=True)


class Sequence:
    """One sequence, in the working directory, whose name is ``here``."""

    def __init__(self, seed: int, here: Path) -> None:
        self._random = random.Random(seed)
        self._here = here
        self._open: list[int] = []
        self._calls: list[Callable[[], Any]] = [
            call
            for call, weight in (
                (self.put, 5), (self.enable, 8), (self.open, 8), (self.close, 5), (self.write, 3), (self.ftruncate, 1),
                (self.open_again, 2), (self.truncate, 2), (self.rename, 2), (self.link, 1), (self.unlink, 1),
                (self.chmod, 2), (self.chown, 1), (self.measure, 4), (self.metadata, 3), (self.content, 3),
                (self.by_nobody, 2),
            )
            for _ in range(weight)
        ]  # fmt: skip

    def run(self) -> list[Any]:
        """Do it; return the names of the calls and their outcomes."""
        for name in NAMES:
            Path(f"s{name}").symlink_to(name)
        done = []
        for _ in range(CALLS):
            call = self._random.choice(self._calls)
            done.append([call.__name__, steps.outcome(call)])
        while self._open:
            os.close(self._open.pop())
        return done

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def _name(self) -> str:
        return self._random.choice(NAMES)

    def _path(self) -> str:
        name = self._name()
        ways = (name, name, name, f"./{name}", f"s{name}", f"/proc/self/cwd/{name}", f"../{self._here.name}/{name}")
        return self._random.choice(ways)

    def _opened(self, flags: int = os.O_RDONLY) -> int:
        return os.open(self._path(), flags)

    def put(self) -> None:
        content = self._random.choice(CONTENTS)
        Path(self._name()).write_bytes(content)

    def enable(self) -> int:
        choose, how = self._random.choice, dict[str, Any]()
        if self._chance(0.3):
            how["block"] = choose((1024, 2048, 4096, 512, 8192, 0, 3000, 1 << 20))
        if self._chance(0.3):
            how["algorithm"] = choose((1, 2, 0, 3))
        if self._chance(0.3):
            how["salt"] = bytes(choose((0, 1, 8, 32, 33)))
        if self._chance(0.1):
            how["version"] = choose((0, 2))
        if self._chance(0.4):
            how["signature"] = steps.SIGNATURES[choose(sorted(steps.SIGNATURES))]
        if self._chance(0.1):
            how[choose(("signature_size", "salt_size"))] = choose((0, 32, 33, 16128, 16129, 1 << 31))
        if self._chance(0.05):
            how[choose(("salt_at", "signature_at", "address", "reserved"))] = 1
        fd = self._opened(choose((0,) * 8 + (1, 2, 3, os.O_PATH)))
        try:
            return steps.enable(fd, **how)
        finally:
            os.close(fd)

    def open(self) -> str:
        choose = self._random.choice
        flags = choose((0, 1, 2, 2, 1, 3)) | choose((
            0, 0, 0, os.O_TRUNC, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_APPEND, os.O_NOFOLLOW, os.O_PATH,
            os.O_DIRECTORY, os.O_CREAT | os.O_TRUNC, os.O_NONBLOCK,
        ))  # fmt: skip
        path, way = self._path().encode(), choose(("open", "openat", "openat2"))
        if way == "open":
            fd = steps.checked(_libc.syscall(2, path, flags, 0o644))
        elif way == "openat":
            fd = steps.checked(_libc.syscall(257, -100, path, flags, 0o644))
        else:
            how = struct.pack("=QQQ", flags, 0o644 if flags & os.O_CREAT else 0, choose((0, 0, 0, 4, 8, 12)))
            fd = steps.checked(_libc.syscall(437, -100, path, how, len(how)))
        if self._chance(0.4):
            self._open.append(fd)
            return "kept open"
        os.close(fd)
        return "closed"

    def close(self) -> None:
        if self._open:
            os.close(self._open.pop(self._random.randrange(len(self._open))))

    def write(self) -> int | None:
        return os.pwrite(self._random.choice(self._open), b"Q", 1) if self._open else None

    def ftruncate(self) -> None:
        if self._open:
            os.ftruncate(self._random.choice(self._open), self._random.choice((0, 5, 5000)))

    def open_again(self) -> None:
        if self._open:
            os.close(os.open(f"/proc/self/fd/{self._random.choice(self._open)}", self._random.choice((0, 1, 2))))

    def truncate(self) -> int:
        return steps.truncated(self._path().encode(), self._random.choice((0, 3, 5000, -1)))

    def rename(self) -> None:
        Path(self._name()).rename(self._name())

    def link(self) -> None:
        old, new = self._name(), Path(self._name())
        new.unlink(missing_ok=True)
        new.hardlink_to(old)

    def unlink(self) -> None:
        Path(self._name()).unlink()

    def chmod(self) -> None:
        Path(self._name()).chmod(self._random.choice((0o644, 0o444, 0o666, 0o600)))

    def chown(self) -> None:
        os.chown(self._name(), self._random.choice((0, steps.NOBODY)), -1)

    def measure(self) -> list[Any]:
        fd = self._opened()
        try:
            return steps.measured(fd, self._random.choice((64, 64, 32, 20, 0)))
        finally:
            os.close(fd)

    def metadata(self) -> Any:
        choose = self._random.choice
        fd = self._opened()
        try:
            kind, offset = choose((1, 2, 3, 0, 4)), choose((0, 0, 0, 1, 200, 5000, 1 << 63))
            return steps.metadata(fd, kind, offset, choose((1 << 16, 1, 100, 0)))
        finally:
            os.close(fd)

    def content(self) -> str:
        return hashlib.sha256(Path(self._name()).read_bytes()).hexdigest()[:16]

    def by_nobody(self) -> Any:
        call = self._random.choice((self.open, self.enable, self.truncate))
        state = self._random.getrandbits(64)

        def act() -> Any:
            self._random.seed(state)
            return call()

        return steps.as_nobody(act)


def main() -> None:
    root, signatures, count = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).read_text(), int(sys.argv[3])
    steps.SIGNATURES.update({name: base64.b64decode(text) for name, text in json.loads(signatures).items()})
    os.umask(0o022)
    for seed in range(count):
        here = root / f"sequence-{seed}"
        here.mkdir()
        here.chmod(0o777)
        os.chdir(here)
        print(json.dumps({"sequence": seed, "calls": Sequence(seed, here).run()}), flush=True)


if __name__ == "__main__":
    main()
