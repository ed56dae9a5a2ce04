"""Compare texts that a chat template renders, at the boundaries of their tags."""

OPENERS, CLOSERS = "<[{(\"'◁", ">]})\"'▷"


def common_prefix(first: str, second: str) -> str:
    """Return the longest common prefix that ends between tags in both texts."""
    length = num_common(first, second)
    while length and not (_is_end(first, length) and _is_end(second, length)):
        length -= 1
    return first[:length]


def common_suffix(first: str, second: str) -> str:
    """Return the longest common suffix that begins with a tag or white space, or is a whole text."""
    length = num_common(first[::-1], second[::-1])
    while length and not (_is_begin(first, length) and _is_begin(second, length)):
        length -= 1
    return first[len(first) - length :]


def num_common(first: str, second: str) -> int:
    """Return the length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _is_end(text: str, position: int) -> bool:
    """Return whether a text can be cut at a position without cutting a tag or a word."""
    if position == len(text):
        return True
    before, char = text[:position], text[position]
    if before.rfind("<") > before.rfind(">"):  # within a tag
        return False
    return char in "<[,◁" or char.isspace() or before[-1] in "\n})" or (before[-1] in ">]" and not char.isalnum())


def _is_begin(text: str, length: int) -> bool:
    """Return whether the last `length` characters of a text begin with a tag or white space."""
    begin = len(text) - length
    return begin == 0 or text[begin] in OPENERS or text[begin].isspace()


def last_tag(text: str) -> str:
    """Return the last tag at the end of a text, with the rest of its line: `<|channel>thought`."""
    text = text.rstrip()
    begin = max(text.rfind(opener) for opener in "<[◁")
    return text[begin:] if begin >= 0 else ""
