"""The sampling parameters: the fields of requests that decide how tokens are sampled, and have a default sampling.

The schema of the requests, the values of --default-sampling, the documentation and the controls of the page come from
this table. Names and defaults are OpenAI's, vLLM's and llama.cpp's, except the default order and `repeat_last_n`, which
is unlimited.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from engine.shared.messages import SAMPLER_ORDER

INT64_MAX = 2**63 - 1
MAX_DRY_LENGTH = 256  # tokens; longer repetitions count as this long


@dataclass(frozen=True, slots=True)
class Number:
    """A number with a fraction, and its limits."""

    low: float
    high: float
    above_low: bool = False  # `low` itself is too small


@dataclass(frozen=True, slots=True)
class Integer:
    """A whole number, and its limits."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Lines:
    """A control of the page for a list, one item a line."""

    kind: ClassVar = "lines"
    label: str


@dataclass(frozen=True, slots=True)
class NumberField:
    """A control of the page for numbers without a usual range. `fallback` applies without it."""

    kind: ClassVar = "number"
    label: str
    min: float
    fallback: float


@dataclass(frozen=True, slots=True)
class Slider:
    """A control of the page for numbers. Its range is what is useful, not what is possible."""

    kind: ClassVar = "slider"
    label: str
    min: float
    max: float
    step: float
    fallback: float


@dataclass(frozen=True, slots=True)
class Parameter:
    """One field of a request."""

    name: str
    type: Number | Integer | None  # None: a list, which the schema of requests limits
    description: str
    control: Slider | NumberField | Lines | None = None
    hint: str = ""  # of the control
    off: float | None = None  # of a field that turns on an extra sampler: the value up to which that is off
    of: str = ""  # of a field that matters with an extra sampler only: the one that turns it on


# By the title of their group on the page, in the order of the page. Those without a title have no control.
GROUPS: Mapping[str, Sequence[Parameter]] = {
    "Chance": (
        Parameter(
            "temperature",
            Number(0, 2),
            "Sampling temperature. Values below 0.00001 select the most likely token. Default: --default-sampling,"
            " the model's recommendation, or 1.",
            Slider("Temperature", 0, 2, 0.05, fallback=1),
            "0 always takes the likeliest token, 1 follows the model's own probabilities, more makes rare tokens "
            "likelier.",
        ),
    ),
    "Which tokens may be chosen": (
        Parameter(
            "min_p",
            Number(0, 1),
            "Keep tokens whose probability is at least this fraction of the most likely token's.",
            Slider("Min-p", 0, 1, 0.01, fallback=0),
            "Keeps tokens that are at least this fraction as likely as the likeliest one: few where the model is "
            "sure, many where it is not.",
        ),
        Parameter(
            "top_k",
            Integer(-1, INT64_MAX),
            "Keep this many of the most likely tokens; 0 or -1: all.",
            Slider("Top-k", 0, 200, 1, fallback=0),
            "Keeps this many of the likeliest tokens; 0 keeps all.",
        ),
        Parameter(
            "top_p",
            Number(0, 1),
            "Keep the most likely tokens whose probabilities add up to this, at least one. Default: as temperature.",
            Slider("Top-p", 0, 1, 0.01, fallback=1),
            "Keeps the likeliest tokens until their probabilities add up to this, so that the long tail of odd "
            "tokens is never chosen.",
        ),
        Parameter(
            "typical_p",
            Number(0, 1, above_low=True),
            "Locally typical sampling: keep the tokens whose information content is closest to the entropy and "
            "whose probabilities add up to this.",
            Slider("Typical-p", 0.01, 1, 0.01, fallback=1),
            "Keeps the tokens that are about as surprising as is usual here, until their probabilities add up to this.",
        ),
        Parameter(
            "top_n_sigma",
            Number(-1, 1000),
            "Keep tokens whose logits are within this many standard deviations of the largest; 0 or less: all.",
            Slider("Top-n-sigma", 0, 5, 0.1, fallback=0),
            "Keeps tokens whose logits are within this many standard deviations of the largest; 0 keeps all. Works"
            " alike at any temperature.",
            off=0,
        ),
        Parameter(
            "xtc_probability",
            Number(0, 1),
            "Probability with which xtc_threshold applies to a token. Default 0: never.",
            Slider("XTC probability", 0, 1, 0.01, fallback=0),
            "How often XTC removes the likeliest tokens, which makes the text less predictable. 0: never.",
            off=0,
        ),
        Parameter(
            "xtc_threshold",
            Number(0, 1),
            "Remove all but the least likely of the tokens with at least this probability. Default 0.1.",
            Slider("XTC threshold", 0, 1, 0.01, fallback=0.1),
            "XTC removes all tokens that are at least this likely, except the least likely of them.",
            of="xtc_probability",
        ),
    ),
    "Repetition": (
        Parameter(
            "repetition_penalty",
            Number(0.01, 10),
            "Values above 1 make tokens that are in the prompt or the output less likely.",
            Slider("Repetition penalty", 0.5, 2, 0.01, fallback=1),
            "Above 1, tokens that are in the prompt or in the answer become less likely; below 1, likelier.",
        ),
        Parameter(
            "presence_penalty",
            Number(-2, 2),
            "Subtracted from the logit of each token that is in the output. Default 0.",
            Slider("Presence penalty", -2, 2, 0.05, fallback=0),
            "Subtracted once from the logit of each token that is in the answer: new subjects become likelier.",
        ),
        Parameter(
            "frequency_penalty",
            Number(-2, 2),
            "Subtracted from a token's logit once for each time it is in the output. Default 0.",
            Slider("Frequency penalty", -2, 2, 0.05, fallback=0),
            "Subtracted from a token's logit for each time that it is in the answer: the more often, the less likely.",
        ),
        Parameter(
            "repeat_last_n",
            Integer(-1, INT64_MAX),
            "Number of last tokens that the penalties consider. Default -1: all.",
            NumberField("Penalties look back", -1, fallback=-1),
            "How many of the last tokens these penalties consider; -1: all.",
            off=-1,
        ),
        Parameter(
            "dry_multiplier",
            Number(0, 1000),
            "DRY: subtract dry_multiplier * dry_base ** (length - dry_allowed_length) from the logits of tokens "
            "that would extend a repetition of `length` tokens. Default 0: off.",
            Slider("DRY", 0, 5, 0.05, fallback=0),
            "Makes tokens less likely that would go on repeating a sequence that was there before. 0: off; 0.8 is "
            "usual.",
            off=0,
        ),
        Parameter(
            "dry_base",
            Number(1, 1000),
            "Base of the power in dry_multiplier. Default 1.75.",
            Slider("DRY base", 1, 4, 0.05, fallback=1.75),
            "How fast DRY's penalty grows with the length of the repetition.",
            of="dry_multiplier",
        ),
        Parameter(
            "dry_allowed_length",
            Integer(1, MAX_DRY_LENGTH),
            "Shorter repetitions are not penalized. Default 2 tokens.",
            Slider("DRY allowed length", 1, 20, 1, fallback=2),
            "Repetitions up to this many tokens cost nothing.",
            of="dry_multiplier",
        ),
        Parameter(
            "dry_penalty_last_n",
            Integer(-1, INT64_MAX),
            "Number of last tokens to search for repetitions; -1: all.",
            NumberField("DRY looks back", -1, fallback=-1),
            "How many of the last tokens are searched for repetitions; -1: all.",
            of="dry_multiplier",
        ),
        Parameter(
            "dry_sequence_breakers",
            None,
            'Strings that repetitions cannot extend across. Default: "\\n", ":", "\\"" and "*".',
            Lines("DRY breakers"),
            "One a line. Repetitions do not extend across these texts.",
        ),
    ),
    "Mirostat": (
        Parameter(
            "mirostat",
            Integer(0, 2),
            "Version of Mirostat to use instead of all samplers except penalties, dry and temperature. Default 0: off.",
            Slider("Version", 0, 2, 1, fallback=0),
            "1 and 2 keep the surprise of the text near a target, in place of all samplers except penalties, DRY "
            "and temperature. 0: off.",
            off=0,
        ),
        Parameter(
            "mirostat_tau",
            Number(0, 1000),
            "Mirostat's target surprise, in bits. Default 5.",
            Slider("Target surprise", 0, 10, 0.1, fallback=5),
            "In bits a token: lower is plainer, higher more varied.",
            of="mirostat",
        ),
        Parameter(
            "mirostat_eta",
            Number(0, 1000),
            "Mirostat's learning rate. Default 0.1.",
            Slider("Learning rate", 0, 1, 0.01, fallback=0.1),
            "How fast it corrects itself.",
            of="mirostat",
        ),
    ),
    "Words and order": (
        Parameter(
            "samplers",
            None,
            f"Samplers to apply, in this order; others are off. Default: {', '.join(SAMPLER_ORDER)}.",
            Lines("Order of samplers"),
            f"One a line; those that are left out are off. Empty: {', '.join(SAMPLER_ORDER)}.",
        ),
    ),
    "": (Parameter("repeat_penalty", Number(0.01, 10), "Alias of repetition_penalty."),),
}
PARAMETERS: Mapping[str, Parameter] = {each.name: each for group in GROUPS.values() for each in group}

MODULE = """// Generated from server/settings/sampling_parameters.py by `python -m tests.docs.generate`.

/** @type {{Record<string, import("./parameters.js").Parameter[]>}} by the title of their group */
export const SAMPLING = {};
"""


def page_module() -> str:
    """Return the module of the page that has the controls."""
    groups = {title: list(map(_control, group)) for title, group in GROUPS.items() if title}
    return MODULE.format(json.dumps(groups, indent=2, ensure_ascii=False))


def _control(parameter: Parameter) -> dict[str, object]:
    assert parameter.control is not None
    control = asdict(parameter.control)
    return {"name": parameter.name, "kind": parameter.control.kind, **control, "hint": parameter.hint}
