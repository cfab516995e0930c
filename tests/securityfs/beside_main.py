"""A FUSE session that serves more than the securityfs, for tests: ``python beside_main.py DIRECTORY IMAGE...``.

Each IMAGE is a file that becomes images/NAME; reading the bytes ``BAD`` in it fails as a corrupted block does. The text
texts/count says how often it was opened. images/254:0 is a disk, and texts/openers says how often that is open. Says
``ready`` on stdout, and adds or removes a node for each line on stdin (``add NAME`` or ``remove NAME``).
"""

import errno
import itertools
import os
import stat
import sys
import threading
from pathlib import Path

from attrs import define, frozen

from ipe_emu.errors import KernelError
from ipe_emu.integrity.declared import Declared
from ipe_emu.keyring import Keyrings
from ipe_emu.linux import procfs
from ipe_emu.lsm import Ipe
from ipe_securityfs.clients import Credentials
from ipe_securityfs.mount import Session
from ipe_securityfs.operations import MountedAs

DEVICE = os.makedev(254, 7)


@frozen
class Content:
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        data = self.data[offset : offset + length]
        if b"BAD" in data:
            raise KernelError(errno.EIO, "a block is corrupted", "verity_handle_err")
        return data


@define(eq=False)
class Disk:
    """A disk in memory; its page 3 cannot be read."""

    data: bytearray
    openers: int = 0

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        if offset < 4 * 4096 and offset + length > 3 * 4096:
            raise KernelError(errno.EIO, "a block is corrupted", "verity_handle_err")
        return bytes(self.data[offset : offset + length])

    def write(self, offset: int, data: bytes) -> int:
        if offset >= self.size:
            raise KernelError(errno.ENOSPC, "", "blkdev_write_iter")
        done = min(len(data), self.size - offset)
        self.data[offset : offset + done] = data[:done]
        return done

    def opened(self) -> None:
        self.openers += 1

    def closed(self) -> None:
        self.openers -= 1


def main() -> None:
    directory, *images = sys.argv[1:]
    mounted_as = MountedAs(Credentials(frozenset({procfs.namespace("self", "user")})), Declared(()))
    session = Session(Ipe(Keyrings(), lambda _: None), directory, mounted_as, beside_others=True)
    subtrees = session.subtrees
    assert subtrees is not None
    for image in images:
        subtrees.add_image(Path(image).name.encode(), Content(Path(image).read_bytes()))
    count = itertools.count(1)
    subtrees.add_text(b"count", lambda: b"%d\n" % next(count))
    disk = Disk(bytearray(b"0123456789abcdef" * 4096))
    subtrees.add_disk(b"254:0", disk)
    subtrees.add_text(b"openers", lambda: b"%d\n" % disk.openers)
    nodes = {}

    def obey() -> None:
        for line in sys.stdin:
            what, name = line.split()
            if what == "add":
                nodes[name] = subtrees.add_device(name.encode(), stat.S_IFBLK | 0o660, DEVICE)
            else:
                subtrees.remove(nodes.pop(name))
            print("done", flush=True)
        session.stop()

    def ready() -> None:
        print("ready", flush=True)
        threading.Thread(target=obey, daemon=True).start()

    session.run(ready)


if __name__ == "__main__":
    main()
