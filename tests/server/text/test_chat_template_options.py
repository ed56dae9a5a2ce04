"""What chat templates read and show of the model; and how the final message is continued, as transformers does."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from server.text.chat_template import END, ChatTemplateError, encode_chat
from server.text.reasoning import ThinkTags
from server.text.tool_formats import GENERIC, HERMES
from tests.server.text.test_chat_template import (
    CHAT,
    CHATML,
    LLAMA3,
    MISTRAL,
    PARTS,
    PARTS_ONLY,
    THINKING,
    byte_tokenizer,
    chat_template,
    text_of,
)

OPTIONS = """\
{%- if not date is defined %}{%- set date = strftime_now("%Y") %}{%- endif %}
{%- macro shout(text) %}{{ text | upper }}{{ mark }}{% endmacro %}
{%- set ns = namespace(found=false) %}{%- set unit = unit | default('m') %}
{%- for message in messages %}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ range(2) | list }}{% endif %}
    {%- if loop.first %}{%- set own = '' %}{%- endif %}{{ own }}
    {%- if false %}{{ raise_exception('no') }}{% endif %}{{ shout(message.content) }}{{ '<tool_call>' + '</think>' }}
{%- endfor %}{{ bos_token }}{{ documents }}{% if add_generation_prompt %}{{ tools }}{% endif %}{{ date }}"""


def test_options_are_what_the_template_reads() -> None:
    template = chat_template(OPTIONS)
    assert template.options == {"date", "mark", "enable_thinking", "unit"}
    assert template.variables > {"messages", "tools", "documents", "add_generation_prompt", "bos_token"}
    assert chat_template(CHATML).options == frozenset()
    assert chat_template(LLAMA3).options == {"date_string"}


def test_what_a_template_shows_of_the_model() -> None:
    template = chat_template(OPTIONS)
    assert (template.tool_format, template.think_tags) == (HERMES, ThinkTags("<think>", "</think>"))
    assert (chat_template(CHATML).tool_format, chat_template(CHATML).think_tags) == (GENERIC, None)


@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL, PARTS, THINKING])
@pytest.mark.parametrize("content", ["It is", "a <b> é", "I think, I think"])
def test_continues_as_transformers_does(source: str, content: str) -> None:
    oracle = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    messages: list[dict[str, Any]] = [CHAT[0], {"role": "assistant", "content": content}]
    expected = oracle.apply_chat_template(messages, chat_template=source, continue_final_message=True, tokenize=False)
    template = chat_template(source)
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == expected
    assert str(expected).endswith(content)


def test_white_space_at_the_end_is_kept() -> None:
    messages = [CHAT[0], {"role": "assistant", "content": " It is \n"}]
    rendered = chat_template(LLAMA3).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered.endswith("<|end_header_id|>\n\nIt is \n")


def test_content_in_any_form_is_continued() -> None:
    contents: list[Any] = ["It is", [{"type": "text", "text": "It is"}]]
    for content in contents:
        messages = [CHAT[0], {"role": "assistant", "content": content}]
        for source in (CHATML, PARTS_ONLY):
            rendered = chat_template(source).render(messages, add_generation_prompt=False, continue_final_message=True)
            assert rendered.endswith("It is")


def test_a_template_that_does_not_write_the_final_message_cannot_continue_it() -> None:
    messages = [CHAT[0], {"role": "assistant", "content": "It is"}]
    for source in ("{{ messages[0].content }}", "{{ messages[1].content }}{{ messages[1].content }}"):
        with pytest.raises(ChatTemplateError, match="final message"):
            chat_template(source).render(messages, continue_final_message=True)
    messages[1]["content"] = f"It {END} is"
    with pytest.raises(ChatTemplateError, match="final message"):
        chat_template(CHATML).render(messages, continue_final_message=True)


def test_control_tokens_in_a_continued_message_are_plain_text() -> None:
    tokenizer = byte_tokenizer()
    messages = [CHAT[0], {"role": "assistant", "content": "a<|im_end|>b"}]
    template = chat_template(CHATML)
    ids = encode_chat(template, tokenizer, messages, add_generation_prompt=False, continue_final_message=True)
    assert text_of(tokenizer, ids).endswith("<|im_start|>assistant\na<|im_end|>b")
    assert tokenizer.tokens(ids).count("<|im_end|>") == 1
