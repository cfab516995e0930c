"""The integrity facts of one file, as IPE's evaluation context holds them."""

from attrs import frozen


@frozen
class Digest:
    """An algorithm's name and a digest (kernel: ``struct digest_info``, security/ipe/digest.h).

    ``algorithm`` is the kernel crypto API's name (``sha256``, ``blake2b-512``), latin-1 decoded where it
    was read from hostile bytes; ``value`` is the raw digest.
    """

    algorithm: str
    value: bytes

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value.hex()}"


@frozen
class Facts:
    """What holds for one file (kernel: ``struct ipe_eval_ctx``, security/ipe/eval.h).

    The default says that nothing is known, which every property treats as false. Where something may hold that could
    not be found out, ``dmverity_in_doubt`` or ``fsverity_in_doubt`` says why, and the fields of that say nothing.
    """

    boot_verified: bool = False
    dmverity_roothash: Digest | None = None
    dmverity_signature: bool = False
    fsverity_digest: Digest | None = None
    fsverity_signature: bool = False
    dmverity_in_doubt: str | None = None
    fsverity_in_doubt: str | None = None


NO_FACTS = Facts()
