"""Writing to nodes from a test's own process."""

import os
from pathlib import Path


def write(node: Path, data: bytes) -> int:
    """One write(2): the count, or minus the errno."""
    fd = os.open(node, os.O_WRONLY)
    try:
        return os.write(fd, data)
    except OSError as error:
        return -(error.errno or 0)
    finally:
        os.close(fd)
