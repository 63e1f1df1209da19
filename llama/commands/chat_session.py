"""A chat in the terminal: the dialog, the commands of the user, and the prompts of the answers."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable

from llama.chat_format import ChatFormat, Message
from llama.commands import terminal
from llama.engine.request import Request
from llama.errors import DataError, GenerationError, LlamaError
from llama.files import atomic_file
from llama.generation import Llama
from llama.sampling import SamplingParams

HELP = """\
/system TEXT   set the system message of the whole dialog; without TEXT, remove it
/retry         answer the last message again
/save FILE     write the dialog as a line of JSON, which `llama finetune` can read
/clear         begin a new dialog with the same system message
/help          show this list
/quit          leave the chat; Ctrl-D does the same
A line that ends with \\ continues in the next line.
Lines between two lines of \"\"\" are one message.
Ctrl-C stops an answer. The part that was shown stays in the dialog."""

BLOCK = '"""'  # begins and ends a message of several lines


class Chat:
    """A dialog with a model in the terminal.

    Attributes: `system` (the system message; "" for none), `messages` (the user's messages and the
    answers alternate), `answers` (the token ids of each answer, with its header and end token).
    """

    def __init__(self, llama: Llama, params: SamplingParams):
        self.llama = llama
        self.params = params
        self.system = ""
        self.messages: list[Message] = []
        self.answers: list[list[int]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/retry": self._retry,
            "/save": self._save,
            "/clear": self._clear,
            "/help": lambda _: terminal.note(HELP),
            "/quit": self._quit,
        }

    def run(self) -> bool:
        """Read and answer until the input ends. Returns False if a line that did not come from a
        terminal was wrong."""
        is_well = True
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # makes input() offer editing and history
        if sys.stdin.isatty():
            terminal.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            try:
                self._handle_line(terminal.read_line(self.llama, "> "))
            except EOFError:
                break
            except KeyboardInterrupt:
                print()
            except UnicodeDecodeError:
                print("error: the input is not UTF-8 text", file=sys.stderr)
                is_well = is_well and sys.stdin.isatty()
            except LlamaError as error:
                print(f"error: {error}", file=sys.stderr)
                is_well = is_well and sys.stdin.isatty()
        if sys.stdin.isatty():
            print()
        return is_well

    def _handle_line(self, line: str) -> None:
        """Run a command, or read the rest of a message that begins with this line, and answer."""
        if line.startswith("/"):
            name, _, argument = line.strip().partition(" ")
            if name not in self._commands:
                raise GenerationError(f"unknown command {name}: /help lists the commands")
            self._commands[name](argument.strip())
        elif text := self._read_message(line).strip():
            self._answer([*self.messages, {"role": "user", "content": text}])

    def _read_message(self, line: str) -> str:
        """The whole message that begins with this line. More lines are read if it continues."""
        lines = []
        if line.strip() == BLOCK:
            while (line := terminal.read_line(self.llama, ". ")).strip() != BLOCK:
                lines.append(line)
            return "\n".join(lines)
        while line.endswith("\\"):
            lines.append(line[:-1])
            line = terminal.read_line(self.llama, ". ")
        return "\n".join([*lines, line])

    # ---- commands -----------------------------------------------------------------------------

    def _set_system(self, text: str) -> None:
        self.system = text
        terminal.note("the system message is set" if text else "no system message")

    def _retry(self, _: str) -> None:
        if not self.messages:
            raise GenerationError("there is no message to answer again")
        self._answer(self.messages[:-1])

    def _save(self, name: str) -> None:
        if not name or not self.messages:
            raise DataError("/save needs the name of a file" if not name else "no dialog to save")
        path = os.path.expanduser(name)
        if os.path.exists(path):
            raise DataError(f"{path} exists: choose another name")
        with atomic_file(path) as file:
            record = {"messages": self._with_system(self.messages)}
            file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        terminal.note(f"saved in {path}")

    def _clear(self, _: str) -> None:
        self.messages, self.answers = [], []
        terminal.note("a new dialog")

    def _quit(self, _: str) -> None:
        raise EOFError

    # ---- an answer ----------------------------------------------------------------------------

    def _answer(self, messages: list[Message]) -> None:
        """Show the answer to the last message, and add it to the dialog."""
        prompt = self._encode(messages)
        limit = self.llama.engine.max_seq_len
        if len(prompt) >= limit:
            raise GenerationError(
                f"the dialog has {len(prompt)} tokens, but max_seq_len is {limit}: "
                "/clear begins a new dialog, /save FILE keeps this one"
            )
        # `Llama.stream` warns if the model was not trained to chat, but only if it gets messages.
        # So the first prompt is sent as messages, and later prompts as token ids.
        sent = prompt if self.answers else self._with_system(messages)
        tokens: list[int] = []
        text, stop_token, reason = "", None, ""
        requests: set[Request] = set()
        start = time.perf_counter()
        first = 0.0
        try:
            with terminal.stream(self.llama, sent, self.params) as events:
                for event in events:
                    first = first or time.perf_counter() - start
                    requests.add(event.request)
                    tokens += [] if event.token is None else [event.token]
                    text += event.text
                    terminal.show(event.text)
                    stop_token = event.request.stop_token
                    if event.finish_reason == "length":
                        reason = "; cut at max_gen_len or max_seq_len"
        except KeyboardInterrupt:
            reason = "; stopped"
        print(flush=True)
        terminal.note(
            f"{terminal.speed(len(tokens), start)}, the first token after {first:.2f} s"
            f"{terminal.acceptance(requests)}{reason}"
        )
        answer = self.llama.formatter.decode_message(tokens, stop_token)
        answer["content"] = text  # the shown text, which a stop string may have cut
        self.answers = [*self.answers[: len(messages) // 2], self._answer_ids(answer, tokens)]
        self.messages = [*messages, answer]

    def _encode(self, messages: list[Message]) -> list[int]:
        """The token ids of the prompt for the next answer.

        In Llama 3's format, earlier answers keep the ids that were generated. Encoding an answer's
        text again could give other ids. The KV cache could not be reused after the first of them.
        """
        formatter = self.llama.formatter
        dialog = self._with_system(messages)
        tokens = formatter.encode_dialog_prompt(dialog)
        if not isinstance(formatter, ChatFormat):
            return tokens
        answers = iter(self.answers)
        tokens = formatter.opening
        for message in formatter.completed(dialog):
            is_answer = message["role"] == "assistant"
            tokens += next(answers) if is_answer else formatter.encode_message(message)
        return tokens + formatter.encode_header({"role": "assistant", "content": ""})

    def _answer_ids(self, answer: Message, tokens: list[int]) -> list[int]:
        """The ids of an answer, with its header and end token, for later prompts. They are the
        generated ids, unless a stop string has cut the text."""
        formatter = self.llama.formatter
        if not isinstance(formatter, ChatFormat):
            return []
        encoded = formatter.encode_message(answer)
        if self.llama.tokenizer.decode(tokens) != answer["content"]:
            return encoded
        return [*formatter.encode_header(answer), *tokens, *formatter.encode_end(answer)]

    def _with_system(self, messages: list[Message]) -> list[Message]:
        """The system message, unless it is empty, and then the messages."""
        system: list[Message] = [{"role": "system", "content": self.system}]
        return [*system, *messages] if self.system else messages
