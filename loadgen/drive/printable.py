"""Text from a server, made fit for a terminal and for a line of a file. Pure."""


def printable(text: str) -> str:
    """`text` with what is no printable character written as an escape; line ends become spaces.

    A server's words may hold sequences that colour, clear or rename the terminal they are shown in.
    """
    line = " ".join(text.splitlines())
    if line.isprintable():
        return line
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in line)
