"""``ipe-emu completion``: shell completion, generated from the parser, so that it cannot fall behind it."""

import argparse
import shlex
from collections.abc import Iterator

from attrs import frozen

from ipe_emu.cli import build_parser, exit_status
from ipe_emu.cli.subparsers import Subparsers, add_command


def add_parser(commands: Subparsers, line: str) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "completion",
        line,
        run,
        examples="""\
source <(ipe-emu completion bash)
source <(ipe-emu completion zsh)      # zsh, after compinit
ipe-emu completion fish > ~/.config/fish/completions/ipe-emu.fish""",
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace) -> int:
    """Print the completion of one shell."""
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell]
    print(write(list(_commands(build_parser()))))
    return exit_status.OK


@frozen
class _Option:
    """An option: its spellings, its line of help, whether a value follows, and which values there are."""

    names: tuple[str, ...]
    help: str
    takes_value: bool
    choices: tuple[str, ...]


@frozen
class _Command:
    """A command by its path (empty: the program itself): its own commands, its options, the words it may be given."""

    path: tuple[str, ...]
    commands: tuple[tuple[str, str], ...]
    options: tuple[_Option, ...]
    words: tuple[str, ...]


def _commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[_Command]:
    options: list[_Option] = []
    words: list[str] = []
    inner: dict[str, argparse.ArgumentParser] = {}
    lines: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            inner = dict(action.choices)
            lines = {choice.dest: choice.help or "" for choice in action._choices_actions}
        elif action.option_strings:
            choices = tuple(map(str, action.choices or ()))
            options.append(_Option(tuple(action.option_strings), _plain(action), action.nargs != 0, choices))
        else:
            words += map(str, action.choices or ())
    yield _Command(path, tuple(lines.items()), tuple(options), tuple(words))
    for name, subparser in inner.items():
        yield from _commands(subparser, (*path, name))


def _plain(action: argparse.Action) -> str:
    text = (
        (action.help or "") % {**vars(action), "prog": "ipe-emu"} if "%" in (action.help or "") else action.help or ""
    )
    return " ".join(text.split())


def _bash(commands: list[_Command]) -> str:
    cases = "\n".join(
        f"        {shlex.quote(' '.join(c.path))}) words={shlex.quote(' '.join(_words(c)))} ;;" for c in commands
    )
    values = "\n".join(
        f"        {'|'.join(names)}) words={shlex.quote(' '.join(choices))}; return ;;"
        for names, choices in _valued(commands)
    )
    subcommands = "|".join(shlex.quote(" ".join(c.path)) for c in commands if c.path)
    return f"""\
# bash completion for ipe-emu
_ipe_emu_words() {{
    local path="" word
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        [ "$word" = -- ] && return
        case "${{path:+$path }}$word" in {subcommands}) path="${{path:+$path }}$word" ;; esac
    done
    case "${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
    esac
    case "$path" in
{cases}
    esac
}}
_ipe_emu() {{
    local words=""
    _ipe_emu_words
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _ipe_emu ipe-emu"""


def _zsh(commands: list[_Command]) -> str:
    return "# zsh completion for ipe-emu\nautoload -U +X bashcompinit && bashcompinit\n" + _bash(commands)


def _fish(commands: list[_Command]) -> str:
    lines = ["# fish completion for ipe-emu"]
    for command in commands:
        names = " ".join(name for name, _ in command.commands)
        seen = " and ".join(f"__fish_seen_subcommand_from {word}" for word in command.path)
        here = seen or "__fish_use_subcommand"
        if command.commands and command.path:
            here = f"{seen}; and not __fish_seen_subcommand_from {names}"
        start = f"complete -c ipe-emu -n {shlex.quote(here.replace(' and ', '; and '))}"
        lines += [f"{start} -f -a {name} -d {shlex.quote(line)}" for name, line in command.commands]
        lines += [f"{start} -f -a {word}" for word in command.words]
        for option in command.options:
            spelled = "".join(f" -l {n[2:]}" if n.startswith("--") else f" -s {n[1:]}" for n in option.names)
            value = f" -x -a {shlex.quote(' '.join(option.choices))}" if option.choices else " -r" * option.takes_value
            lines.append(f"{start}{spelled}{value} -d {shlex.quote(option.help)}")
    return "\n".join(lines)


def _words(command: _Command) -> list[str]:
    return [*(n for n, _ in command.commands), *(n for o in command.options for n in o.names), *command.words]


def _valued(commands: list[_Command]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Options with a fixed set of values, and those with a file for a value: nothing is proposed for these."""
    found = {o.names: o.choices for c in commands for o in c.options if o.takes_value}
    return list(found.items())
