"""ChatML and Zephyr's format, which Llamas of other makers use, and the table of all formats."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, get_args

from llama.chat_format import (
    ChatFormat,
    Dialog,
    Llama2ChatFormat,
    Message,
    Vocabulary,
    assistant_message,
    check_dialog,
    check_message,
    refuse_tools,
)
from llama.errors import DialogError
from llama.tools import Tool, Written

FormatName = Literal["llama3", "llama2", "chatml", "zephyr"]


class ChatMLFormat(ChatFormat):
    """ChatML, of SmolLM2 and others: <|im_start|>role, a newline, content, <|im_end|>, a newline.

    default_system: the text of a system message for dialogs that have none; "": no such message.

    Source: https://huggingface.co/HuggingFaceTB/SmolLM2-360M-Instruct
    """

    roles = ("system", "user", "assistant")

    def __init__(self, tokenizer: Vocabulary, default_system: str = ""):
        for name in ("<|im_start|>", "<|im_end|>"):
            if name not in tokenizer.special_tokens:
                raise DialogError(f"{tokenizer.model_path} has no {name}, which ChatML needs")
        self.tokenizer = tokenizer
        self.default_system = default_system

    @property
    def opening(self) -> list[int]:
        return []

    def completed(self, dialog: Dialog) -> Dialog:
        """The dialog, with the default system message in front if it has no system message."""
        if not self.default_system or (dialog and dialog[0]["role"] == "system"):
            return dialog
        return [{"role": "system", "content": self.default_system}, *dialog]

    def encode_header(self, message: Message) -> list[int]:
        return self._encode_open_message(message, "")

    def encode_message(self, message: Message) -> list[int]:
        check_message(message, self.roles, name="the message")
        return self._encode_written(Written(message["role"], [message["content"]]))

    def written(
        self, dialog: Dialog, tools: Sequence[Tool] = (), date: str | None = None
    ) -> list[Written]:
        refuse_tools(tools, date)
        return [Written(m["role"], [m["content"]]) for m in self.completed(dialog)]

    def _encode_open_message(self, message: Message, *texts: str) -> list[int]:
        # Role and content are encoded together, because a blank at the start of the content may
        # form one token with the newline before it.
        text = f"{message['role']}\n{''.join(texts)}"
        return [self._marker("<|im_start|>"), *self.tokenizer.encode(text, bos=False, eos=False)]

    def encode_end(self, message: Message) -> list[int]:
        return [self._marker("<|im_end|>"), *self.tokenizer.encode("\n", bos=False, eos=False)]


class ZephyrFormat:
    """Zephyr's form, of TinyLlama and others: <|role|>, a newline, content, eos, a newline.

    The markers may be plain text. A message that contains one is refused, because its text could
    imitate another role.

    Source: https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0
    """

    roles: tuple[str, ...] = ("system", "user", "assistant")

    def __init__(self, tokenizer: Vocabulary):
        self.tokenizer = tokenizer
        self._tags = {role: f"<|{role}|>" for role in self.roles}

    def encode_dialog_prompt(
        self,
        dialog: Dialog,
        continue_final_message: bool = False,
        tools: Sequence[Tool] = (),
        date: str | None = None,
    ) -> list[int]:
        """Return the ids of every message with its eos, and of the next answer's tag.

        Raises:
            DialogError: empty dialog, wrong role, a system message that is not the first, a last
                message of the wrong role, a tag inside a message, tools or a date.
        """
        refuse_tools(tools, date)
        check_dialog(dialog, self.roles, ("assistant",) if continue_final_message else ("user",))
        for i, message in enumerate(dialog):
            if tag := next((t for t in self._tags.values() if t in message["content"]), None):
                raise DialogError(f"message {i} contains {tag}, which Zephyr's form reserves")
        answer = ""
        if continue_final_message:
            answer = dialog[-1]["content"]
            dialog = dialog[:-1]
        tokens: list[int] = []
        for message in dialog:
            tokens += self._encode(message["role"], message["content"], is_first=not tokens)
            tokens.append(self.tokenizer.eos_id)
        return tokens + self._encode("assistant", answer, is_first=False)

    def _encode(self, role: str, content: str, is_first: bool) -> list[int]:
        """Encode the newline that ends the previous message, the tag, a newline and the content. If
        the tag is no special token of the vocabulary, it is encoded together with the text around
        it."""
        tag, newline = self._tags[role], "" if is_first else "\n"
        encode = partial(self.tokenizer.encode, bos=False, eos=False)
        if tag not in self.tokenizer.special_tokens:
            return encode(f"{newline}{tag}\n{content}")
        before = encode(newline) if newline else []
        return [*before, self.tokenizer.special_tokens[tag], *encode(f"\n{content}")]

    def decode_message(self, tokens: Sequence[int], stop_token: int | None) -> Message:
        """Return the assistant's message for generated `tokens`. It has no stop_reason."""
        return assistant_message(self.tokenizer, tokens)


AnyFormat = ChatFormat | Llama2ChatFormat | ZephyrFormat


def make_format(name: FormatName, tokenizer: Vocabulary, default_system: str = "") -> AnyFormat:
    """Make the chat format with this name. Only ChatML uses default_system. Raises DialogError if
    the vocabulary lacks a marker, or if the name is unknown."""
    if name == "chatml":
        return ChatMLFormat(tokenizer, default_system)
    formats: dict[str, Callable[[Vocabulary], AnyFormat]]
    formats = {"llama3": ChatFormat, "llama2": Llama2ChatFormat, "zephyr": ZephyrFormat}
    if name not in formats:
        raise DialogError(
            f"format is {name!r}: it must be one of {', '.join(get_args(FormatName))}"
        )
    return formats[name](tokenizer)
