"""``python -m ipe_emu`` is the program ipe-emu."""

import sys

from ipe_emu.cli import main

if __name__ == "__main__":
    sys.exit(main())
