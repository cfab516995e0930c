"""``ipe-emu verity scan``: the files of a tree, and what is known of each."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ipe_emu.cli import exit_status
from ipe_emu.cli.options import add_integrity_options, declared_of
from ipe_emu.cli.output import complain, escape, known
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.cli.verity.progress import counting

if TYPE_CHECKING:
    from ipe_emu.simulate.known import Known
    from ipe_emu.simulate.tree import Found


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "scan",
        "list the programs, libraries and modules of a tree, with their digests and what is known of them",
        run,
        examples="""\
ipe-emu verity scan rootfs/
ipe-emu verity scan --all --json --integrity facts.toml /opt/app""",
    )
    parser.add_argument("tree", metavar="DIR", help="the root directory of the tree")
    parser.add_argument("--all", action="store_true", help="every regular file, not only what IPE is asked about")
    parser.add_argument("--hash-alg", choices=("sha256", "sha512"), default="sha256", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_integrity_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print a line for each file, as it is found."""
    from ipe_emu.simulate.known import Known
    from ipe_emu.simulate.tree import open_tree

    status = exit_status.OK
    separator = "\n"
    if args.json:
        print(json.dumps({"tree": escape(args.tree)}, indent=2).removesuffix("\n}") + ',\n  "files": [', end="")
    with open_tree(args.tree) as tree, counting("measuring") as one_more:
        for entry in _entries(args, Known(tree, declared_of(args))):
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


def _entries(args: argparse.Namespace, what: "Known") -> Iterator[dict[str, Any]]:
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
            yield entry | _measured(args, what, found)
        except OSError as error:
            yield entry | {"fault": escape(error.strerror or str(error))}


def _measured(args: argparse.Namespace, what: "Known", found: "Found") -> dict[str, Any]:
    from ipe_emu.cli.verity.images import JOBS
    from ipe_emu.integrity.fsverity import measure, sealed_digest
    from ipe_emu.linux.fsverity import measure_verity

    facts = what.facts_of(found.path, found.fd, found.st)
    sealed = sealed_digest(found.fd, measure_verity)
    return {
        "digest": str(measure(found.fd, args.hash_alg, jobs=JOBS)),
        "sealed": None if sealed is None else str(sealed),
        "known": [*known(facts), *(["sealed"] if sealed is not None else [])],
    }
