"""All that a rehearsed machine is made from, known before its first process starts."""

from collections.abc import Callable, Sequence

from attrs import frozen

from ipe_emu.linux.seccomp import Rule
from ipe_emu.rehearse.image import Unpacked
from ipe_emu.rehearse.init_arguments import InitArguments


@frozen
class BootBlueprint:
    """The machine. ``user_namespace`` is a descriptor of its own, whose root is ``root`` outside.

    ``unpack`` puts the image into the directory that is given as a descriptor.
    """

    user_namespace: int
    root: int
    rules: Sequence[Rule]
    init: InitArguments
    unpack: Callable[[int], Unpacked]
