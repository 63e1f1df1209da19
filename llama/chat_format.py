"""Meta's chat formats: dialogs as token ids, for Llama 3.x and for Llama 2.

Both formats have the same two methods. `encode_dialog_prompt` turns a dialog into prompt ids, and
`decode_message` turns generated ids into a message. Text inside a message never becomes a marker,
except a <|python_tag|> at the start of an assistant's message.

With continue_final_message a dialog ends with the beginning of the assistant's answer. The prompt
then ends with that text, so that the model continues it. The text's trailing blanks are kept.

For Llama 3.1 and later, the prompt also describes the tools and contains the earlier calls; see
`tools.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NotRequired, Protocol, TypedDict, get_args

from llama.errors import DialogError
from llama.tools import (
    PYTHON_TAG,
    Tool,
    ToolCall,
    Written,
    as_meta_writes,
    as_template_writes,
    calls_of,
    check_tools,
)

# Llama 2's tags, by the names that Meta's package gives them.
B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
SPECIAL_TAGS = (B_INST, E_INST, B_SYS.strip(), E_SYS.strip())
UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."

Role = Literal["system", "user", "assistant", "ipython"]
StopReason = Literal["end_of_turn", "end_of_message"]


class Message(TypedDict):
    """One message of a dialog. A `Dialog` is a sequence of messages.

    Keys:
        role: "system", "user", "assistant" or, for a tool's output, "ipython".
        content: the text.
        stop_reason: only from the assistant, may be left out. "end_of_message" says that the model
            waits for a tool's output before its turn is over; "end_of_turn" that it is over.
        tool_calls: only from the assistant, may be left out: the calls of tools.
    """

    role: Role
    content: str
    stop_reason: NotRequired[StopReason]
    tool_calls: NotRequired[Sequence[ToolCall]]


Dialog = Sequence[Message]


class Vocabulary(Protocol):
    """The part of `Tokenizer` that a chat format uses."""

    model_path: Path
    special_tokens: dict[str, int]
    eos_id: int

    def encode(self, s: str, bos: bool | None, eos: bool | None) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_texts(self, ids: Sequence[int]) -> list[str]: ...


class ChatFormat:
    """Llama 3.x: <|start_header_id|>role<|end_header_id|>, an empty line, content, <|eot_id|>.

    Args:
        tokenizer: its vocabulary must have the markers.

    Attributes:
        roles: the roles that a message may have.

    Raises:
        DialogError: the vocabulary has no ids for the headers.

    Source: https://www.llama.com/docs/model-cards-and-prompt-formats/llama3_1
    """

    roles: tuple[str, ...] = get_args(Role)

    def __init__(self, tokenizer: Vocabulary):
        if "<|start_header_id|>" not in tokenizer.special_tokens:
            raise DialogError(f"{tokenizer.model_path} has no ids for Llama 3's message headers")
        self.tokenizer = tokenizer

    @property
    def opening(self) -> list[int]:
        """The ids before the first message."""
        return [self._marker("<|begin_of_text|>")]

    def completed(self, dialog: Dialog) -> Dialog:
        """The dialog with the messages that the format adds. This format adds none."""
        return dialog

    def encode_header(self, message: Message) -> list[int]:
        """Return the ids of the header, which names the role of `message`."""
        return [
            self._marker("<|start_header_id|>"),
            *self.tokenizer.encode(message["role"], bos=False, eos=False),
            self._marker("<|end_header_id|>"),
            *self.tokenizer.encode("\n\n", bos=False, eos=False),
        ]

    def encode_message(self, message: Message) -> list[int]:
        """Return the ids of the header, the content without surrounding blanks, and the end marker.

        Raises:
            DialogError: not a message, a role other than the four of Llama 3.1, or a marker that
                the vocabulary lacks.
        """
        check_message(message, self.roles, name="the message")
        return self._encode_written(as_meta_writes([message], ())[0])

    def encode_end(self, message: Message) -> list[int]:
        """Return the ids after the content of `message`."""
        from_assistant = message["role"] == "assistant"
        awaits_tool = from_assistant and message.get("stop_reason") == "end_of_message"
        return [self._marker("<|eom_id|>" if awaits_tool else "<|eot_id|>")]

    def _encode_open_message(self, message: Message, *texts: str) -> list[int]:
        """The ids of the header and of the texts, without the end marker."""
        tokens = self.encode_header(message)
        for i, text in enumerate(texts):
            # A generated tool call decodes to text that starts with the tag. The tag becomes its id
            # again, so that the model reads the ids that it generated.
            if i == 0 and message["role"] == "assistant" and text.startswith(PYTHON_TAG):
                tokens.append(self._marker(PYTHON_TAG))
                text = text.removeprefix(PYTHON_TAG)
            tokens += self.tokenizer.encode(text, bos=False, eos=False)
        return tokens

    def _encode_written(self, written: Written) -> list[int]:
        message: Message = {"role": written.role, "content": ""}
        if written.awaits_tool:
            message["stop_reason"] = "end_of_message"
        return self._encode_open_message(message, *written.texts) + self.encode_end(message)

    def encode_dialog_prompt(
        self,
        dialog: Dialog,
        continue_final_message: bool = False,
        tools: Sequence[Tool] = (),
        date: str | None = None,
    ) -> list[int]:
        """Return the ids of <|begin_of_text|>, every message, and the header of the next answer.

        Args:
            dialog: messages in order; a system message comes first.
            continue_final_message: the prompt ends with the header and the text of the last
                message, instead of the header of the next answer.
            tools: what the model may call. A vocabulary of Llama 3.1 or later is needed.
            date: today's date, such as "26 Jul 2024". If it is given, the dialog is written as the
                chat template of Meta's Hugging Face folders writes it. Otherwise the dialog is
                written as Meta's code writes it.

        Raises:
            DialogError: empty dialog, wrong role, wrong tool, wrong date, a system message that is
                not the first, or a last message from a wrong role. The last message must be from
                `user` or `ipython`. With continue_final_message it must be from `assistant`.
        """
        last = ("assistant",) if continue_final_message else ("user", "ipython")
        check_dialog(dialog, self.roles, last)
        check_tools(tools)
        if date is not None and not (isinstance(date, str) and date and date.isprintable()):
            raise DialogError(f"the date is {date!r:.80}: it must be one line, as 26 Jul 2024")
        answer: Message = {"role": "assistant", "content": ""}
        if continue_final_message:
            *dialog, answer = dialog
            if answer.get("tool_calls"):
                raise DialogError("the last message has tool_calls, which cannot be continued")
        tokens = self.opening
        for written in self.written(dialog, tools, date):
            tokens += self._encode_written(written)
        return tokens + self._encode_open_message(answer, answer["content"].lstrip())

    def written(
        self, dialog: Dialog, tools: Sequence[Tool] = (), date: str | None = None
    ) -> list[Written]:
        """The messages of the dialog's prompt, with the description of the tools and the date."""
        if date is None:
            return as_meta_writes(self.completed(dialog), tools)
        return as_template_writes(dialog, tools, date)

    def decode_message(self, tokens: Sequence[int], stop_token: int | None) -> Message:
        """Return the assistant's message for generated `tokens`, which exclude `stop_token`."""
        message = assistant_message(self.tokenizer, tokens)
        # A tokenizer.json of Llama 3.0 has no <|eom_id|>.
        if stop_token is not None and stop_token == self.tokenizer.special_tokens.get("<|eom_id|>"):
            message["stop_reason"] = "end_of_message"
        return message

    def _marker(self, name: str) -> int:
        if name not in self.tokenizer.special_tokens:
            raise DialogError(f"{self.tokenizer.model_path} has no {name}, which the dialog needs")
        return self.tokenizer.special_tokens[name]


class Llama2ChatFormat:
    """Llama 2: "[INST] user [/INST] assistant " between bos and eos, for each finished turn.

    The markers are plain text. A message that contains one is refused, because its text could
    imitate another role.

    Source: https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-2
    """

    roles: tuple[str, ...] = ("system", "user", "assistant")
    tags = SPECIAL_TAGS

    def __init__(self, tokenizer: Vocabulary):
        self.tokenizer = tokenizer

    def encode_dialog_prompt(
        self,
        dialog: Dialog,
        continue_final_message: bool = False,
        tools: Sequence[Tool] = (),
        date: str | None = None,
    ) -> list[int]:
        """Return the ids of each finished turn with bos and eos, and of the last turn with bos.

        Raises:
            DialogError: empty dialog, wrong role, wrong order, a tag inside a message, tools or a
                date. The right order is an optional system message, and then user and assistant
                in turn. The last message is from user. With continue_final_message it is from
                assistant.
        """
        refuse_tools(tools, date)
        check_dialog(dialog, self.roles, ("assistant",) if continue_final_message else ("user",))
        for i, message in enumerate(dialog):
            if tag := next((tag for tag in self.tags if tag in message["content"]), None):
                raise DialogError(f"message {i} contains {tag}, which the Llama 2 format reserves")

        turns = list(dialog)
        if turns[0]["role"] == "system":
            system, first = turns[0]["content"], turns[1]["content"]
            opening = f"{B_SYS}{system}{E_SYS}{first}"
            turns[:2] = [{"role": turns[1]["role"], "content": opening}]
        for i, message in enumerate(turns):
            expected = ("user", "assistant")[i % 2]
            if message["role"] != expected:
                i += len(dialog) - len(turns)  # the index in the caller's dialog
                raise DialogError(
                    f"message {i} is from {message['role']}, but must be from {expected}: "
                    "in the Llama 2 format user and assistant take turns, user first"
                )

        beginning = turns.pop()["content"].lstrip() if continue_final_message else ""
        texts = [message["content"].strip() for message in turns]
        tokens: list[int] = []
        # The last user message has no answer yet, so zip leaves it out.
        for user, assistant in zip(texts[::2], texts[1::2], strict=False):
            turn = f"{B_INST} {user} {E_INST} {assistant} "
            tokens += self.tokenizer.encode(turn, bos=True, eos=True)
        turn = f"{B_INST} {texts[-1]} {E_INST}" + (f" {beginning}" if beginning else "")
        return tokens + self.tokenizer.encode(turn, bos=True, eos=False)

    def decode_message(self, tokens: Sequence[int], stop_token: int | None) -> Message:
        """Return the assistant's message for generated `tokens`. It has no stop_reason."""
        return assistant_message(self.tokenizer, tokens)


def assistant_message(tokenizer: Vocabulary, tokens: Sequence[int]) -> Message:
    return {"role": "assistant", "content": tokenizer.decode(tokens)}


def refuse_tools(tools: Sequence[Tool], date: str | None) -> None:
    """Raise DialogError if tools or a date are given. Formats that support neither call this."""
    if tools or date is not None:
        given = "tools" if tools else "a date"
        raise DialogError(f"{given} in the prompt: only Llama 3's chat format has {given}")


def check_dialog(dialog: Dialog, roles: tuple[str, ...], last: tuple[str, ...]) -> None:
    if not dialog:
        raise DialogError("the dialog is empty: it needs at least one message")
    for i, message in enumerate(dialog):
        check_message(message, roles, name=f"message {i}")
        if message["role"] == "system" and i > 0:
            raise DialogError(f"message {i} is from system, but only the first message may be")
    if (speaker := dialog[-1]["role"]) not in last:
        raise DialogError(f"the last message must be from {' or '.join(last)}, not {speaker}")


def check_message(message: Message, roles: tuple[str, ...], name: str) -> None:
    if not isinstance(message, Mapping):
        kind = type(message).__name__
        raise DialogError(f"{name} must be a mapping with role and content, not {kind}")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise DialogError(f"{name} must have a {key!r} that is a string")
    if message["role"] not in roles:
        raise DialogError(
            f"{name} has the role {message['role']!r}, but it must be one of {', '.join(roles)}"
        )
    if message.get("tool_calls"):
        if message["role"] != "assistant" or "ipython" not in roles:
            raise DialogError(
                f"{name} from {message['role']} has tool_calls, which only an assistant's message "
                "in Llama 3's chat format may have"
            )
        calls_of(message)
    if message.get("stop_reason", "end_of_turn") not in get_args(StopReason):
        raise DialogError(
            f"{name} has the stop_reason {message.get('stop_reason')!r}, "
            f"but it must be one of {', '.join(get_args(StopReason))}"
        )
