"""Random texts that are hard for tokenizers: pieces of real text with odd characters, and random Unicode."""

import random
from collections.abc import Iterator

from tests.support.paths import ROOT

LINES = [
    *[line for line in (ROOT / "tests/bench/english.txt").read_text(encoding="utf-8").splitlines() if line],
    "日本語のテキストと漢字。中文：你好，世界！ 한국어 텍스트",
    "Größe, naïve café, Ελληνικά, русский язык, עברית, العربية, हिन्दी, ไทย",
    "😀 👍🏽 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \U0001f9ff",
    "    if x:\n\t\treturn 'a'  # 12345\n\n\n",
    "WE'LL I'm don'T 3.14 ½ x² CamelCaseHTTP snake_case aaaa aaaaaa ......",
]
ODD = ["  ", " ", "\n", "\r\n", "\t", "é", "<", "s>", "0", "12", "\u3000", "\u00a0", "ﬁ", "½", "'S", "🧿", "X"]
RANGES = [(0x20, 0x7F), (0x80, 0x800), (0x800, 0xD800), (0x10000, 0x1FFFF)]


def random_texts(rng: random.Random, num_texts: int) -> Iterator[str]:
    for _ in range(num_texts):
        if rng.random() < 0.3:
            yield "".join(
                chr(rng.randrange(*rng.choice(RANGES))) if rng.random() < 0.7 else rng.choice(" \n")
                for _ in range(rng.randrange(30))
            )
            continue
        line = rng.choice(LINES)
        start = rng.randrange(len(line))
        characters = list(line[start : start + rng.randrange(1, 80)])
        for _ in range(rng.randrange(4)):
            characters.insert(rng.randrange(len(characters) + 1), rng.choice(ODD))
        yield "".join(characters)
