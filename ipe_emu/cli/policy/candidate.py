"""``ipe-emu policy from``: a policy that lets the programs of a tree run, for somebody to read and to sign."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from attrs import define, field

from ipe_emu.cli import exit_status
from ipe_emu.cli.files import create, refuse_to_overwrite
from ipe_emu.cli.output import complain, escape, print_bytes, say
from ipe_emu.cli.subparsers import Subparsers, add_command
from ipe_emu.cli.trees import add_tree_argument, opened_tree
from ipe_emu.errors import UserError
from ipe_emu.policy.lint import MAX_SIGNED, SIGNATURE_BYTES, lint
from ipe_emu.policy.parse import check_name, parse_policy
from ipe_emu.policy.render import default_statement, property_statement, statement
from ipe_emu.policy.rule import Action, Operation, Property, PropertyType, Rule, Version

if TYPE_CHECKING:
    from ipe_emu.simulate.judge import Judgement
    from ipe_emu.simulate.tree import Tree

_MOST_NAMED = 10
_FIRMWARE = (b"/lib/firmware", b"/usr/lib/firmware")


def add_parser(commands: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "from",
        "write a candidate policy for a tree",
        run,
        description=(
            "Write a policy that lets the programs, libraries and modules of a tree run and denies everything else: by"
            " the root hash of an image, or by the fs-verity digest of each file. The exit status is 1 if it is too"
            " large to be signed."
        ),
        examples="""\
ipe-emu policy from --hash-image root.verity root.squashfs > candidate.pol
ipe-emu policy from rootfs/ > candidate.pol
ipe-emu policy from --name Tools --comments -o tools.pol /opt/tools""",
    )
    parser.add_argument("--name", default="Candidate", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--policy-version", default="1.0.0", metavar="X.Y.Z", help="default: %(default)s")
    parser.add_argument(
        "--hash-alg", choices=("sha256", "sha512"), default="sha256", help="of fs-verity digests (default: %(default)s)"
    )
    parser.add_argument("--comments", action="store_true", help="name the file before each rule")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to (default: stdout)")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    parser.add_argument("--json", action="store_true", help="print the policy and what is to be known of it as JSON")
    add_tree_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Write the policy and say what its author should know."""
    if args.output is not None:
        refuse_to_overwrite(args.output, force=args.force)
    candidate = _Candidate(args.name, _version(args.policy_version))
    from ipe_emu.cli.verity.images import JOBS
    from ipe_emu.cli.verity.progress import counting
    from ipe_emu.integrity.declared import Declared
    from ipe_emu.simulate.census import census
    from ipe_emu.simulate.known import Known, Seals

    with opened_tree(args) as (tree, root_hash, _), counting("looking") as one_more:
        volume = None if root_hash is None else Property(PropertyType.DMV_ROOTHASH, root_hash)
        seals = Seals(args.hash_alg) if volume is None else None
        for _, judgement in census(Known(tree, Declared(()), seals, jobs=JOBS)):
            one_more()
            if judgement is not None:
                candidate.add(judgement, volume)
        candidate.look_for_firmware(tree, volume)
    if not candidate.rules:
        complain("there is no program, library or module in this tree: no policy was written")
        return exit_status.NOT_JUDGED
    text = candidate.text(comments=args.comments)
    if args.output is not None:
        create(args.output, text, mode=0o644, force=args.force)
    candidate.remark(text)
    if args.json:
        print(json.dumps(candidate.as_json(text), indent=2))
    elif args.output is None:
        print_bytes(text)
    return candidate.status(text)


def _version(text: str) -> Version:
    try:
        version = Version.parse(text)
    except ValueError:
        raise UserError(f"--policy-version is {text!r}; it is three numbers, such as 1.0.0") from None
    if not all(0 <= part <= 0xFFFF for part in (version.major, version.minor, version.rev)):
        raise UserError(f"--policy-version is {text!r}; each part is at most 65535")
    return version


@define
class _Candidate:
    """The rules so far, each with the first file that needs it."""

    name: str
    version: Version
    rules: dict[tuple[Operation, Property], bytes] = field(factory=dict)
    unmeasured: list[str] = field(factory=list)
    notes: list[str] = field(factory=list)

    def __attrs_post_init__(self) -> None:
        check_name(self.name)

    def add(self, judgement: "Judgement", volume: Property | None) -> None:
        """Add the rule for a file: its volume's, or that of its own digest."""
        from ipe_emu.simulate.judge import Kind

        digest = judgement.facts.fsverity_digest
        if volume is None and digest is None:
            self.unmeasured.append(f"{escape(judgement.path)}: {escape(judgement.reason)}")
        elif judgement.asked:
            operation = Operation.KMODULE if judgement.kind is Kind.MODULE else Operation.EXECUTE
            prop = volume or Property(PropertyType.FSV_DIGEST, digest)
            self.rules.setdefault((operation, prop), judgement.path)

    def look_for_firmware(self, tree: "Tree", volume: Property | None) -> None:
        """Let firmware be loaded from a volume; of single files, say that it is not."""
        for directory in _FIRMWARE:
            if tree.names(directory):
                if volume is not None:
                    self.rules[Operation.FIRMWARE, volume] = directory
                else:
                    self.notes.append(f"{escape(directory)} holds firmware, which this policy does not let be loaded")
                return

    def text(self, *, comments: bool) -> bytes:
        lines = [f"policy_name={self.name} policy_version={self.version}", default_statement(None, Action.DENY)]
        for (operation, prop), path in self.rules.items():
            if comments:
                lines.append(f"# {escape(path)}")
            lines.append(statement(Rule(operation, (prop,), Action.ALLOW)))
        return "".join(f"{line}\n" for line in lines).encode()

    def remark(self, text: bytes) -> None:
        for kind in Operation:
            count = sum(operation is kind for operation, _ in self.rules)
            if count:
                say(f"{count:,} rule{'s' * (count != 1)} for op={kind.value}")
        limit = MAX_SIGNED - SIGNATURE_BYTES
        if self.is_too_large(text):
            complain(
                f"{len(text):,} bytes are too many for a signed policy: with a signature (about {SIGNATURE_BYTES:,}"
                f" bytes) they are over {MAX_SIGNED:,}, and the kernel answers EMSGSIZE. What to do:\n"
                "  - put the tree on a dm-verity volume: one rule, for its root hash (or dmverity_signature=TRUE)\n"
                "  - sign the digests of the files (ipe-emu verity fs sign): one rule, fsverity_signature=TRUE\n"
                "  - or compile it into the kernel as its boot policy, which is not signed and may be as long"
            )
        else:
            say(f"{len(text):,} bytes, of about {limit:,} that a signed policy may have")
        if any(prop.type is PropertyType.FSV_DIGEST for _, prop in self.rules):
            say("the rules hold for files that are sealed (fsverity enable), and for no copies that are not")
        for note in (*self.notes, *(doubt.text for doubt in lint(parse_policy(text), text) if doubt.kind != "size")):
            say(f"note: {note}")
        for line in self.unmeasured[:_MOST_NAMED]:
            complain(f"no rule for {line}")
        if len(self.unmeasured) > _MOST_NAMED:
            complain(f"no rules for {len(self.unmeasured) - _MOST_NAMED:,} more")

    def is_too_large(self, text: bytes) -> bool:
        return len(text) + SIGNATURE_BYTES > MAX_SIGNED

    def status(self, text: bytes) -> int:
        if self.is_too_large(text):
            return exit_status.DENIED
        return exit_status.NOT_JUDGED if self.unmeasured else exit_status.OK

    def as_json(self, text: bytes) -> dict[str, Any]:
        rules = [
            {"operation": operation.value, "property": property_statement(prop), "path": escape(path)}
            for (operation, prop), path in self.rules.items()
        ]
        return {
            "policy": text.decode(), "bytes": len(text), "most_bytes": MAX_SIGNED - SIGNATURE_BYTES, "rules": rules,
            "notes": self.notes, "unmeasured": self.unmeasured,
        }  # fmt: skip
