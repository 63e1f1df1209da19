"""Chat templates of Hugging Face's folders: two for folders that are written, and known forms.

The two templates are the formats of `chat_format.py` for transformers' `apply_chat_template`. Each
gives the ids that `encode_dialog_prompt` gives. No template is ever run here.
"""

import re
from dataclasses import dataclass

from llama.chat_forms import FormatName

# A blank line follows the header of a message. The content has no blanks around it. There is no
# newline between messages.
LLAMA_3_TEMPLATE = r"""{%- if tools %}
    {{- raise_exception('this template knows no tools: describe them in the system message') }}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant', 'ipython'] %}
        {{- raise_exception('the role must be system, user, assistant or ipython') }}
    {%- endif %}
    {%- if message['role'] == 'system' and not loop.first %}
        {{- raise_exception('only the first message may be from system') }}
    {%- endif %}
    {%- if message['content'] is not string %}
        {{- raise_exception('the content must be a string') }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim }}
    {%- if message['role'] == 'assistant' and message['stop_reason'] == 'end_of_message' %}
        {{- '<|eom_id|>' }}
    {%- else %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {%- if messages[-1]['role'] not in ['user', 'ipython'] %}
        {{- raise_exception('the last message must be from user or ipython') }}
    {%- endif %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""

# The system message is part of the first user message. Each turn begins with bos and, if it is
# finished, ends with eos.
LLAMA_2_TEMPLATE = r"""{%- if tools %}
    {{- raise_exception('this template knows no tools: describe them in the system message') }}
{%- endif %}
{%- if add_generation_prompt and messages[-1]['role'] != 'user' %}
    {{- raise_exception('the last message must be from user') }}
{%- endif %}
{%- for message in messages %}
    {%- if message['content'] is not string %}
        {{- raise_exception('the content must be a string') }}
    {%- endif %}
    {%- for tag in ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'] %}
        {%- if tag in message['content'] %}
            {{- raise_exception('a message contains ' + tag + ', which the format reserves') }}
        {%- endif %}
    {%- endfor %}
{%- endfor %}
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set opening = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
    {%- if message['role'] != ['user', 'assistant'][loop.index0 % 2] %}
        {{- raise_exception('user and assistant must take turns, user first') }}
    {%- endif %}
    {%- set content = (opening + message['content'] if loop.first else message['content']) | trim %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + content + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}
"""


# ---- recognizing the form of a template ---------------------------------------------------------

# The parts that every template of a form contains after `_normalized`. The templates of a form
# differ in blanks, in quotes and in what they do for tools.
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
    """The form of a template. Its text is compared with the known forms, and is never run. Returns
    None if it matches no known form, or several."""
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
