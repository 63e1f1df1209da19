"""Chat templates, as Hugging Face's folders hold them: two that are written, and known forms.

The two templates are the formats of `chat_format.py` for transformers' `apply_chat_template`. Each
gives the ids that `encode_dialog_prompt` gives. No template is ever run here.
"""

import re
from dataclasses import dataclass

from llama.chat_forms import FormatName

LLAMA_3_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'ipython'] %}
        {{- raise_exception('the role must be system, user, assistant or ipython') }}
    {%- endif %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('only the first message may be from system') }}
    {%- endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim }}
    {%- if message.role == 'assistant' and message.stop_reason == 'end_of_message' %}
        {{- '<|eom_id|>' }}
    {%- else %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

LLAMA_2_TEMPLATE = """\
{%- set ns = namespace(opening='', turn=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- set ns.opening = '<<SYS>>\\n' + message.content + '\\n<</SYS>>\\n\\n' %}
    {%- elif message.role == 'user' and ns.turn % 2 == 0 %}
        {{- bos_token + '[INST] ' + (ns.opening + message.content) | trim + ' [/INST]' }}
        {%- set ns.opening = '' %}
        {%- set ns.turn = ns.turn + 1 %}
    {%- elif message.role == 'assistant' and ns.turn % 2 == 1 %}
        {{- ' ' + message.content | trim + ' ' + eos_token }}
        {%- set ns.turn = ns.turn + 1 %}
    {%- else %}
        {{- raise_exception('after an optional system message, user and assistant take turns') }}
    {%- endif %}
{%- endfor %}
"""


# ---- which form a template is of ----------------------------------------------------------------

# What a template of each form contains, as `_normalized` writes it. The templates of a form differ
# in blanks, in quotes and in what they do for tools.
FORMS: dict[FormatName, tuple[str, ...]] = {
    "llama3": ("'<|start_header_id|>'+message.role+'<|end_header_id|>", "<|eot_id|>"),
    "llama2": ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    "chatml": ("'<|im_start|>'+message.role+''+message.content+'<|im_end|>'",),
    "zephyr": tuple(
        f"'<|{role}|>'+message.content+eos_token" for role in ("system", "user", "assistant")
    ),
}
DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}]+?)<\|im_end\|>")


@dataclass(frozen=True)
class ChatForm:
    """A chat format by its name, and the default system message of a ChatML template."""

    name: FormatName
    default_system: str = ""


def form_of(template: str) -> ChatForm | None:
    """The form that a template writes, from its text alone: it is compared, and never run. None
    where it is of no known form, or of several."""
    text = _normalized(template)
    names = [name for name, parts in FORMS.items() if all(part in text for part in parts)]
    if len(names) != 1:
        return None
    system = DEFAULT_SYSTEM.search(template) if names == ["chatml"] else None
    return ChatForm(names[0], system[1] if system else "")


def _normalized(template: str) -> str:
    """Without blanks and newlines, with one kind of quotes, and x.role for x['role']."""
    text = re.sub(r"\s|\\n", "", template).replace('"', "'")
    return re.sub(r"\['(\w+)'\]", r".\1", text)
