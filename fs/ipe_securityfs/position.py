"""The position of a descriptor that is open for reading and writing, of which FUSE and securityfs think differently."""

from attrs import define


@define(eq=False)
class FilePosition:
    """Where the next read(2) begins.

    FUSE moves the position by what was written; the write handlers of IPE leave ``*offset`` alone, so that a read after
    a write begins where the last read ended.
    """

    fuse: int = 0
    securityfs: int = 0

    def has_written(self, end: int) -> None:
        """Take note of a write(2) that ended at ``end`` for FUSE."""
        self.fuse = end

    def of_read(self, offset: int) -> int:
        """Return where a read(2) begins of which FUSE says that it begins at ``offset``."""
        if offset != self.fuse:  # lseek(2), which fails on securityfs
            self.fuse = self.securityfs = offset
        return self.securityfs

    def has_read(self, length: int) -> None:
        """Take note of how much that read(2) got."""
        self.fuse += length
        self.securityfs += length
