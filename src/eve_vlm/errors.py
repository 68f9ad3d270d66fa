"""How an error of a library is quoted in a sentence of ours.

What a user can mend is a `ValueError` of one sentence: what, where, and how to mend it.  Easy to
get wrong: a library's message may be empty, or ten lines of which the first says what happened.
"""


def first_line(error: Exception) -> str:
    r"""The first line of a library's message, or its kind where it says nothing.

    >>> first_line(ValueError("no such file.\nTry another one."))
    'no such file'
    """
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


__all__ = ["first_line"]
