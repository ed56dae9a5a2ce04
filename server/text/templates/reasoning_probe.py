"""Find out how a chat template writes reasoning, by rendering conversations and looking at what known values are in."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.text.parsers.answer_parser import ReasoningTags
from server.text.parsers.tool_formats import split_text
from server.text.templates.syntaxes import CONTENT, NAMES
from server.text.templates.tool_probe import (
    Message,
    Render,
    after_question,
    assistant,
    common_prefix,
    common_suffix,
    last_tag,
    user,
)

REASONING = "lwreasoning"
FIELDS = ("reasoning_content", "reasoning", "thinking")  # of messages; Hugging Face's name is the first

# Template variables that switch reasoning -> their values that turn it on and off.
SWITCHES: Mapping[str, tuple[Any, Any]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "reasoning": (True, False),
    "reasoning_effort": ("high", "none"),
}

# Tags of models whose templates do not write the reasoning of earlier messages.
KNOWN_TAGS = (
    ReasoningTags("<think>", "</think>"),
    ReasoningTags("[THINK]", "[/THINK]"),
    ReasoningTags("<seed:think>", "</seed:think>"),
    ReasoningTags("<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningTags("◁think▷", "◁/think▷"),
)


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model writes reasoning and content.

    Attributes:
        tags: what the reasoning is written between; None: the model does not reason, or its tags were not found.
        message_field: the name under which the template reads the reasoning of earlier messages, if it does.
        content_markers: texts before and after the content.
        is_recognized: False if the template has a switch for reasoning, but no tags were found.
    """

    tags: ReasoningTags | None = None
    message_field: str | None = None
    content_markers: tuple[str, ...] = ()
    is_recognized: bool = True


def probe_reasoning_format(render: Render, options: Collection[str]) -> ReasoningFormat:
    """Return the format of reasoning; `options` are the variables of the template that requests can set."""
    variants = _variants(options)
    prompts = [after_question(render, add_generation_prompt=True, **variant) for variant in variants]
    probe = _Probe(render, variants, [prompt for prompt in prompts if prompt])
    fields = [field for field in FIELDS if probe.find_tags((field,))]
    tags = probe.find_tags(fields) or next((tags for tags in KNOWN_TAGS if probe.are_used(tags)), None)
    return ReasoningFormat(
        tags,
        message_field=fields[0] if fields else None,
        content_markers=probe.content_markers(tags),
        is_recognized=tags is not None or not SWITCHES.keys() & set(options),
    )


def _variants(options: Collection[str]) -> list[dict[str, Any]]:
    """Return the values of the switches with which to render: none, all turned on, all turned off."""
    names = [name for name in SWITCHES if name in options]
    return [{}, *({name: SWITCHES[name][index] for name in names} for index in (0, 1) if names)]


@dataclass(frozen=True, slots=True)
class _Probe:
    """Renders conversations.

    Attributes:
        variants: template variables to render with.
        prompts: the ends of prompts, after the user's question, for each of the variants.
    """

    render: Render
    variants: Sequence[dict[str, Any]]
    prompts: Sequence[str]

    def find_tags(self, fields: Collection[str]) -> ReasoningTags | None:
        """Return the tags around the reasoning of a message that has it in these fields, if the template writes it."""
        reasoning: dict[str, Any] = dict.fromkeys(fields, REASONING)
        for variant in self.variants if fields else ():
            plain, text = (self._write(assistant(CONTENT, **more), variant) for more in ({}, reasoning))
            plain_call, call = (self._write(assistant(num_calls=1, **more), variant) for more in ({}, reasoning))
            is_in_text = 0 <= text.find(REASONING) < text.find(CONTENT)
            is_in_call = 0 <= call.find(REASONING) < call.find(NAMES[0])
            if not is_in_text and not is_in_call:
                continue
            before, _, _ = (text if is_in_text else call).partition(REASONING)
            ends = []
            if is_in_text:
                end, content_start = text.partition(REASONING)[2].partition(CONTENT)[0], self._content_start()
                ends.append(end.removesuffix(content_start) if end.strip() != content_start.strip() else end)
            if is_in_call:
                end = call.partition(REASONING)[2].partition(NAMES[0])[0]
                ends.append(end.removesuffix(common_suffix(end, plain_call.partition(NAMES[0])[0])))
            end = common_prefix(ends[0], call.partition(REASONING)[2]) if is_in_text and is_in_call else ends[0]
            start = self._start_tag(before, plain.partition(CONTENT)[0])
            if start and end.strip():
                return ReasoningTags(start, end.strip())
        return None

    def are_used(self, tags: ReasoningTags) -> bool:
        """Return whether the template opens the reasoning, describes it, or drops that of earlier messages."""
        for variant in self.variants:
            prompt = self.render([user()], add_generation_prompt=True, **variant) or ""
            if tags.are_opened_by(prompt) or (tags.start in prompt and tags.end in prompt):
                return True
        written = f"{tags.start}{REASONING}{tags.end}{CONTENT}"
        text = self.render([user(), assistant(written), user()]) or REASONING
        return REASONING not in text and CONTENT in text

    def content_markers(self, tags: ReasoningTags | None) -> tuple[str, ...]:
        """Return the texts that the model writes before and after the content of an answer."""
        start = self._content_start()
        is_in_prompt = all(prompt.rstrip().endswith(start.strip()) for prompt in self.prompts)
        if is_in_prompt or "<" not in start or (tags is not None and (tags.start in start or tags.end in start)):
            return ()
        plain, call = self._write(assistant(CONTENT)), self._write(assistant(CONTENT, num_calls=1))
        after = plain.partition(CONTENT)[2]
        end = common_prefix(after, call.partition(CONTENT)[2].partition(NAMES[0])[0])
        more = split_text(after.removeprefix(end))[:-1]  # the last is the end of the turn
        return tuple(filter(None, (start.strip(), end.strip(), *more[:1])))

    def _content_start(self) -> str:
        """Return the text before the content of an answer without reasoning."""
        texts = [self._write(assistant(CONTENT), variant).partition(CONTENT)[0] for variant in self.variants]
        return self._after_header(texts[-1])

    def _write(self, message: Message, variant: Mapping[str, Any] | None = None) -> str:
        return after_question(self.render, message, **(variant or {})) or ""

    def _after_header(self, text: str) -> str:
        """Return a text without the part with which every prompt ends."""
        return text.removeprefix(min((common_prefix(text, prompt) for prompt in self.prompts), key=len, default=text))

    def _start_tag(self, before: str, before_content: str) -> str:
        """Return the tag before the reasoning, which the text before it ends with.

        `before_content` is the text before the content of a message without reasoning.
        """
        start = self._after_header(before).strip()
        if start:
            return start
        if before == before_content:  # only the prompt has the tag
            opened = [prompt.removeprefix(before).strip() for prompt in self.prompts if prompt.startswith(before)]
            return next(filter(None, opened), "")
        return last_tag(before)
