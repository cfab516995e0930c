"""All that a rehearsed machine is made from, known before its first process starts."""

from collections.abc import Sequence

from attrs import frozen

from ipe_emu.linux.seccomp import Rule
from ipe_emu.rehearse.image.open import Image
from ipe_emu.rehearse.init_arguments import InitArguments


@frozen
class BootBlueprint:
    """The machine. ``user_namespace`` is a descriptor of its own, whose root is ``root`` outside."""

    user_namespace: int
    root: int
    rules: Sequence[Rule]
    init: InitArguments
    image: Image
