"""Names of files and classes as text that can be printed and saved anywhere."""


def decodable(text: str) -> str:
    r"""The text with bytes that are no UTF-8, which Python keeps as surrogates, as ``\xe9``."""
    halves = "".join(  # of a character, which stand for no byte
        letter.encode("unicode_escape").decode("ascii")
        if "\ud800" <= letter <= "\udfff" and not "\udc80" <= letter <= "\udcff"
        else letter
        for letter in text
    )
    return halves.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(text: object) -> str:
    """The text with everything that a terminal obeys or cannot show written as an escape."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in decodable(str(text))
    )
