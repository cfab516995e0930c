"""Text from an image, made harmless: nothing in it moves a cursor, ends a line or changes the direction of writing."""


def printable(text: str) -> str:
    r"""Return ``text`` with everything that is not printable as ``\n``, ``\xNN`` or ``\uNNNN``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
