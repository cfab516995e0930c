"""Make a sequence that shows a difference as short and as plain as it can be."""

from collections.abc import Callable, Iterator

from tests.conformance.generate import Step

Sequence = list[Step]
#: Which of several sequences show a difference; asked for many at once, as a machine boots anew for each question.
Differing = Callable[[list[Sequence]], list[bool]]


def shrink(sequence: Sequence, differing: Differing, *, at_once: int = 80) -> Sequence:
    """Leave out steps, in ever smaller pieces, and then what makes single steps special, while a difference stays."""
    size = max(len(sequence) // 2, 1)
    while size:
        candidates = [sequence[:start] + sequence[start + size :] for start in range(0, len(sequence), size)]
        shorter = _first([c for c in candidates if c], differing, at_once)
        if shorter is not None:
            sequence = shorter
            size = min(size, max(len(sequence) // 2, 1))
        else:
            size //= 2
    while (plainer := _first(list(_plainer(sequence)), differing, at_once)) is not None:
        sequence = plainer
    return sequence


def _first(candidates: list[Sequence], differing: Differing, at_once: int) -> Sequence | None:
    for start in range(0, len(candidates), at_once):
        asked = candidates[start : start + at_once]
        for candidate, differs in zip(asked, differing(asked), strict=True):
            if differs:
                return candidate
    return None


def _plainer(sequence: Sequence) -> Iterator[Sequence]:
    """The sequence with one step made plainer: done by root, with fewer payloads, nothing mutated, a shorter text."""
    for number, step in enumerate(sequence):
        for changed in _plainer_steps(step):
            yield [*sequence[:number], changed, *sequence[number + 1 :]]


def _plainer_steps(step: Step) -> Iterator[Step]:
    for key in ("as", "auid"):
        if key in step:
            yield {name: value for name, value in step.items() if name != key}
    payloads = step.get("payloads", ())
    if len(payloads) > 1:
        for number in range(len(payloads)):
            yield step | {"payloads": [*payloads[:number], *payloads[number + 1 :]]}
    for number, payload in enumerate(payloads):
        for key in ("mutate", "attributes", "digest", "certificate", "no_certificates", "pad"):
            if key in payload:
                plain = {name: value for name, value in payload.items() if name != key}
                yield step | {"payloads": [*payloads[:number], plain, *payloads[number + 1 :]]}
        lines = payload.get("text", "").split("\n")
        for line in range(1, len(lines) - 1):
            plain = payload | {"text": "\n".join(lines[:line] + lines[line + 1 :])}
            yield step | {"payloads": [*payloads[:number], plain, *payloads[number + 1 :]]}
