"""Masks of every token of a real vocabulary, compared with partial matches of regular expressions."""

import random
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from unittest.mock import Mock

import pytest
import regex
from llguidance import LLMatcher

from engine.grammar import matcher as matcher_module
from engine.grammar.compiler import MAX_KEPT_BYTES, MIN_KEPT_BYTES, GrammarCompiler, GrammarError
from engine.grammar.matcher import GrammarManager, Matcher
from engine.shared.messages import SamplingParams
from server.text.tokenizer import Tokenizer

SEED = 9
EOS_TOKEN_IDS = (2, 0)
NUM_TOKEN_IDS = 49152
PATTERNS = [r"([a-z]{2,9} ){1,3}[0-9]+", r'(yes|no|not "sure"|n[oa]+h?)', r"(\w|, )*[.!?]", r"[^\x00-\x7f]{1,3}x?"]


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return Tokenizer.from_model(smollm2_path)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.to_json(), EOS_TOKEN_IDS)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> list[str | None]:
    """Return the text of each token, or None for control tokens and parts of characters."""
    pieces = [tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in range(tokenizer.vocab_size)]
    return [None if "\ufffd" in piece or i in tokenizer.special_ids else piece for i, piece in enumerate(pieces)]


def of_regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def new_matcher(
    compiler: GrammarCompiler, grammar: str, num_token_ids: int = NUM_TOKEN_IDS, /, **params: object
) -> Matcher:
    compiled: Future[LLMatcher] = Future()
    compiled.set_result(compiler.compile(grammar))
    sampling = SamplingParams(max_tokens=100, **params)  # type: ignore[arg-type]
    return Matcher(compiled, sampling, EOS_TOKEN_IDS, num_token_ids)


def allowed(mask: bytes) -> set[int]:
    bits = int.from_bytes(mask, "little")
    return {token_id for token_id in range(8 * len(mask)) if bits >> token_id & 1}


def test_every_token_of_every_mask(
    compiler: GrammarCompiler, tokenizer: Tokenizer, vocabulary: list[str | None]
) -> None:
    """Compare masks along random walks, skipping tokens that are no text. Ends are checked separately."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    for pattern in PATTERNS:
        matcher, output, text = new_matcher(compiler, of_regex(pattern)), list[int](), ""
        matches = regex.compile(pattern).fullmatch
        for _ in range(3):
            token_ids = allowed(*matcher.masks(output))
            right = {i for i, piece in enumerate(vocabulary) if piece and matches(text + piece, partial=True)}
            assert {token_id in token_ids for token_id in EOS_TOKEN_IDS} == {matches(text) is not None}
            found = {token_id for token_id in token_ids - set(EOS_TOKEN_IDS) if vocabulary[token_id] is not None}
            forced = matcher.forced_tokens(output)
            assert found == (set(forced[:1]) or right)
            assert found <= right
            if not found:
                break
            output.append(rng.choice(sorted(found)))
            text += vocabulary[output[-1]] or ""


def test_what_is_forced_is_spelled_as_the_tokenizer_does(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    text = '{"temperature_celsius":20,"conversation_history":[]}'
    matcher = new_matcher(compiler, of_regex(regex.escape(text, special_only=True) + "x?y"))
    forced = matcher.forced_tokens([])
    spelled = tokenizer.encode(text, add_special_tokens=False)
    assert spelled[: len(forced)] == forced
    assert len(forced) >= len(spelled) - 2  # the last ones may merge with what follows
    for position, mask in enumerate(matcher.masks([], forced)[:-1]):
        assert allowed(mask) == {forced[position]}


def test_tokens_that_the_model_does_not_have(compiler: GrammarCompiler) -> None:
    """The tokenizer of the grammar may have more tokens than the embedding has rows. None of these is forced."""
    grammar = of_regex(regex.escape('{"temperature_celsius":20,"conversation_history":[]}', special_only=True))
    forced = new_matcher(compiler, grammar).forced_tokens([])
    largest = max(forced)
    *before, output = (forced[:length] for length in range(forced.index(largest) + 1))
    matcher = new_matcher(compiler, grammar, largest)
    assert matcher.forced_tokens([]) == output
    assert all(allowed(mask) for each in before for mask in matcher.masks(each))
    assert matcher.masks(output) == [b""]
    assert matcher.problem == "it allows only tokens that the model does not have"
    (mask,) = new_matcher(compiler, grammar, largest + 1).masks(output)
    assert allowed(mask) == {largest}


SENTENCES = "[a-z ]+[.!]( [A-Z][a-z ]+[.!])*"


@pytest.mark.parametrize(
    "grammar",
    [
        of_regex(SENTENCES),
        # guidance's grammars limit tokens like this. llguidance cannot roll these back.
        f"start: text\ntext[max_tokens=50]: /{SENTENCES}/",
        f'start: text "!"?\ntext[stop="!", max_tokens=50]: /{SENTENCES}/',
    ],
)
def test_a_draft_leaves_no_trace(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: str) -> None:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    output, draft, wrong = encode("the cat"), encode(" sat down. The"), encode("9")
    matcher = new_matcher(compiler, grammar)
    apart = [new_matcher(compiler, grammar).masks(output + draft[:length])[0] for length in range(len(draft) + 1)]
    before = matcher.masks(output)
    for _ in range(2):
        assert matcher.masks(output, draft) == apart
        assert matcher.problem is None
        assert matcher.masks(output, [*draft[:2], *wrong, *draft[2:]]) == apart[:3] + [b""] * (len(draft) - 1)
        assert matcher.cut(output, [*draft[:2], *wrong]) == draft[:2]
        assert matcher.cut(output, draft) == draft
    assert matcher.masks(output) == before
    assert matcher.masks(output + draft) == apart[-1:]


def test_ends_that_come_too_early(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")

    def ends(grammar: str, output: Sequence[int], **params: object) -> set[int]:
        (mask,) = new_matcher(compiler, of_regex(grammar), **params).masks(output)
        return allowed(mask) & {*EOS_TOKEN_IDS, a, b}

    assert ends("(a|b)*", [a]) == {0, 2, a, b}
    assert ends("(a|b)*", [a], ignore_eos=True) == {a, b}
    assert ends("(a|b)*", [a], min_tokens=1, stop_token_ids=(b,)) == {0, 2, a, b}
    assert ends("(a|b)*", [a], min_tokens=2, stop_token_ids=(b,)) == {a}
    assert ends("(a|b)*", [a], min_tokens=2, stop_token_ids=(b, 10**9), ignore_eos=True) == {a}
    # Control tokens are no text.
    (mask,) = new_matcher(compiler, of_regex(r"(.|\n)*")).masks([])
    assert allowed(mask) & tokenizer.special_ids == set(EOS_TOKEN_IDS)
    (mask,) = new_matcher(compiler, 'start: <|im_start|> "a"').masks([])
    assert allowed(mask) == {1}
    # The grammar takes precedence if it leaves no choice.
    assert ends("a?", [a], min_tokens=9, ignore_eos=True) == {0, 2}
    assert ends("ab", [a], min_tokens=9, stop_token_ids=(b,)) == {b}


def test_what_takes_too_much(compiler: GrammarCompiler, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """A grammar that exceeds a limit is refused, or ends in an empty mask."""
    with pytest.raises(GrammarError, match="larger than"):
        compiler.compile("start: " + "a" * 200_000)
    matcher = new_matcher(compiler, 'start: s{1,300}\ns: s s | "a" | "b" s "c" | ""')
    output = tokenizer.encode("a", add_special_tokens=False) * 20
    assert len(output) == 20
    masks = matcher.masks([], output)
    assert masks[0] != b""
    assert masks[-1] == b""
    assert "a grammar cannot be followed: " in caplog.text
    assert matcher.masks([]) == masks[:1]


@pytest.mark.parametrize("grammar", ["/P/", "T\nT: (/P/){100}", "t\nt: /P/ ~ 1000"])
@pytest.mark.parametrize(
    ("pattern", "is_followed"), [("(a{1000}){1000}", False), ("(a?){5000}a{5000}", False), ("(.*a){300}", True)]
)
def test_counts_behind_the_beginning_take_a_bounded_time(
    compiler: GrammarCompiler, grammar: str, pattern: str, is_followed: bool
) -> None:
    """Compute the masks of a random output; llguidance stops where a mask takes more steps than its limits allow."""
    matcher = new_matcher(compiler, f'start: ("x"|"y") {grammar.replace("P", pattern)}')
    draw = random.Random(SEED)
    output: list[int] = []
    while len(output) < 9 and (mask := matcher.masks(output)[0]):
        matcher.forced_tokens(output)
        output.append(draw.choice(sorted(allowed(mask))))
    assert len(output) == (9 if is_followed else 2)
    assert str(matcher.problem).startswith("None" if is_followed else "lexer error: too many ")  # expressions or states


@pytest.mark.checklist("C22")
def test_compiled_grammars_are_kept_within_bounds(compiler: GrammarCompiler) -> None:
    for number in range(MAX_KEPT_BYTES // MIN_KEPT_BYTES + 10):
        compiler.compile(f'start: "{number}"')
    assert len(compiler._compiled) == MAX_KEPT_BYTES // MIN_KEPT_BYTES
    first, again = compiler.compile('start: "a" "b"'), compiler.compile('start: "a" "b"')
    first.consume_tokens(first.compute_ff_tokens())
    assert not again.is_accepting()


def test_the_tokenizer_is_read_once_and_not_before_it_is_needed(
    tokenizer: Tokenizer, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matcher_module, "GrammarCompiler", read := Mock(return_value=compiler))
    manager = GrammarManager(EOS_TOKEN_IDS, NUM_TOKEN_IDS)
    manager.prepare()
    manager.set_tokenizer("a tokenizer")
    assert not read.called
    params = SamplingParams(max_tokens=5, grammar=of_regex("ab"))
    assert manager.new_matcher(params).masks([])[0] != b""
    manager.set_tokenizer("a tokenizer")
    manager.prepare()
    manager.new_matcher(params)
    read.assert_called_once_with("a tokenizer", EOS_TOKEN_IDS)
