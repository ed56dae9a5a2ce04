"""Fill-in-the-middle (FIM): prompts for the text between a prefix and a suffix, of models that are trained for it.

https://arxiv.org/abs/2207.14255. Most models expect the prefix first, some the suffix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from server.text.gguf_tokenizer import GGUFVocabulary


class FIMMarkers(NamedTuple):
    """The tokens before the prefix, before the suffix and before the text between them."""

    prefix: str
    suffix: str
    middle: str
    is_suffix_first: bool = False


MARKERS = (
    FIMMarkers("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    FIMMarkers("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    FIMMarkers("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    FIMMarkers("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    FIMMarkers("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
    FIMMarkers("<PRE>", "<SUF>", "<MID>"),
    FIMMarkers("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    FIMMarkers("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", is_suffix_first=True),  # Seed-Coder
)


@dataclass(frozen=True, slots=True)
class FIMTokens:
    """The ids of a model's FIM tokens, and the order in which it expects the parts."""

    prefix_id: int
    suffix_id: int
    middle_id: int
    is_suffix_first: bool

    def join(self, prefix: Sequence[int], suffix: Sequence[int]) -> list[int]:
        """Return the prompt for the text between two others."""
        parts = [[self.prefix_id, *prefix], [self.suffix_id, *suffix]]
        first, second = reversed(parts) if self.is_suffix_first else parts
        return [*first, *second, self.middle_id]


def find_fim_tokens(token_to_id: Callable[[str], int | None], markers: FIMMarkers | None) -> FIMTokens | None:
    """Return the FIM tokens of a vocabulary, or None if it has none.

    `markers` are those that the model's file names, if it does; otherwise they are found by their names in MARKERS.
    """
    for each in MARKERS if markers is None else (markers,):
        prefix_id, suffix_id, middle_id = map(token_to_id, each[:3])
        if prefix_id is not None and suffix_id is not None and middle_id is not None:
            return FIMTokens(prefix_id, suffix_id, middle_id, each.is_suffix_first)
    return None


def fim_markers_of_gguf(vocabulary: GGUFVocabulary) -> FIMMarkers | None:
    """Return the FIM tokens that a GGUF file names, under the present keys or the older ones."""
    for keys in (("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")):
        prefix, suffix, middle = map(vocabulary.named_token, keys)
        if prefix is not None and suffix is not None and middle is not None:
            known = [markers for markers in MARKERS if markers[:3] == (prefix, suffix, middle)]
            return known[0] if known else FIMMarkers(prefix, suffix, middle)
    return None
