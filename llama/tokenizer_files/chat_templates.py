"""The two chat formats of `chat_format.py` as templates for transformers' `apply_chat_template`.

They are written into Hugging Face's folders, and never run here. Each gives the ids that
`encode_dialog_prompt` gives.
"""

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
