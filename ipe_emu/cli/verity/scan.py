"""``ipe-emu verity scan``: the files of a tree, and what is known of each."""

import argparse
import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ipe_emu.cli import exit_status
from ipe_emu.cli.options import add_integrity_options, declared_of
from ipe_emu.cli.output import complain, escape, known
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.cli.trees import add_tree_argument, opened_tree
from ipe_emu.cli.verity.progress import counting
from ipe_emu.errors import NotJudgedError, UserError

if TYPE_CHECKING:
    from ipe_emu.simulate.known import Known
    from ipe_emu.simulate.tree import Found
    from ipe_emu.volumes.ext4_seals import SealedFiles


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "scan",
        "list the programs, libraries and modules of a tree, with their digests and what is known of them",
        run,
        examples="""\
ipe-emu verity scan rootfs/
ipe-emu verity scan root.ext4
ipe-emu verity scan --all --json --integrity facts.toml /opt/app""",
    )
    add_tree_argument(parser)
    parser.add_argument("--all", action="store_true", help="every regular file, not only what IPE is asked about")
    parser.add_argument("--hash-alg", choices=("sha256", "sha512"), default="sha256", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_integrity_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print a line for each file, as it is found."""
    from ipe_emu.integrity.facts import Facts
    from ipe_emu.simulate.known import Known

    if (args.integrity or args.boot_verified) and not os.path.isdir(args.tree):  # noqa: PTH112 - as the user wrote it
        raise UserError("--integrity and --boot-verified name files of this machine, and none that is in an image")
    status = exit_status.OK
    separator = "\n"
    if args.json:
        print(json.dumps({"tree": escape(args.tree)}, indent=2).removesuffix("\n}") + ',\n  "files": [', end="")
    with opened_tree(args) as (tree, root_hash, seals), counting("measuring") as one_more:
        volumes = [] if root_hash is None else [(tree.path, Facts(dmverity_roothash=root_hash))]
        for entry in _entries(args, Known(tree, declared_of(args, volumes)), seals):
            one_more()
            if entry["digest"] is None:
                complain(f"{entry['path']}: {entry['fault']}")
                status = exit_status.NOT_JUDGED
            if args.json:
                print(f"{separator}    {json.dumps(entry)}", end="")
                separator = ",\n"
            elif entry["digest"] is not None:
                facts = ", ".join(entry["known"]) or "-"
                print(f"{entry['kind']:8}{entry['digest']}  {facts}  {entry['path']}")
    if args.json:
        print("\n  ]\n}")
    return status


def _entries(args: argparse.Namespace, what: "Known", seals: "SealedFiles | None") -> Iterator[dict[str, Any]]:
    from ipe_emu.simulate.census import census
    from ipe_emu.simulate.tree import Unreadable

    for found, judgement in census(what):
        if judgement is None and not args.all:
            continue
        entry: dict[str, Any] = {
            "path": escape(found.path),
            "kind": "file" if judgement is None else judgement.kind.value,
            "size": found.st.st_size if found.st is not None else None,
            "digest": None,
            "sealed": None,
            "known": [] if judgement is None else known(judgement.facts),
        }
        if isinstance(found, Unreadable):
            yield entry | {"fault": escape(found.reason)}
            continue
        try:
            yield entry | _measured(args, what, found, seals)
        except OSError as error:
            yield entry | {"fault": escape(error.strerror or str(error))}
        except NotJudgedError as error:
            yield entry | {"fault": escape(str(error))}


def _measured(args: argparse.Namespace, what: "Known", found: "Found", seals: "SealedFiles | None") -> dict[str, Any]:
    from ipe_emu.cli.verity.images import JOBS
    from ipe_emu.integrity.fsverity import measure, sealed_digest
    from ipe_emu.linux.fsverity import measure_verity

    facts = what.facts_of(found.path, found.fd, found.st)
    seal = None if seals is None else seals.of(found.st)
    sealed = seal.digest if seal is not None else sealed_digest(found.fd, measure_verity)
    digest = measure(found.fd, args.hash_alg, jobs=JOBS)
    words = [] if sealed is None else ["sealed" + (f" as {sealed}" if sealed != digest else "")]
    if seal is not None and seal.signature:
        words.append("with a signature")
    return {
        "digest": str(digest),
        "sealed": None if sealed is None else str(sealed),
        "known": [*known(facts), *words],
    }
