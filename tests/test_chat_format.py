"""The prompt formats: Llama 3's equals Meta's code, and Llama 2's equals strings written out."""

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.chat_format import ChatFormat, Dialog, Llama2ChatFormat, Message
from llama.errors import DialogError
from llama.tokenizer import Tokenizer

TAGS = ("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<s>", "</s>", " ", "\n")
CONTENT = st.lists(st.text() | st.sampled_from(TAGS)).map("".join)


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def system(content: str) -> Message:
    return {"role": "system", "content": content}


@pytest.fixture(scope="session")
def llama3(llama3_tokenizer_path: Path) -> ChatFormat:
    return ChatFormat(Tokenizer(llama3_tokenizer_path))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Llama2ChatFormat:
    """The Llama 2 format with a small SentencePiece tokenizer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["[INST] <<SYS>>", "<</SYS>> Hello there [/INST] I am well"] * 9),
        model_writer=model, model_type="bpe", byte_fallback=True, vocab_size=320,
        bos_id=1, eos_id=2, pad_id=-1, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama2") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Llama2ChatFormat(Tokenizer(path))


@pytest.fixture(scope="session", params=["trained", "real"])
def llama2(request: pytest.FixtureRequest) -> Llama2ChatFormat:
    """The Llama 2 format with the small tokenizer, and with the real one if it is available."""
    if request.param == "trained":
        return request.getfixturevalue("trained")
    return Llama2ChatFormat(Tokenizer(request.getfixturevalue("llama2_tokenizer_path")))


@pytest.fixture(params=["llama3", "trained"])
def either(request: pytest.FixtureRequest) -> ChatFormat | Llama2ChatFormat:
    return request.getfixturevalue(request.param)


# ---- Llama 3 -------------------------------------------------------------------------------------


def test_llama3_message(llama3: ChatFormat):
    message = user("This is a test sentence.")
    header = [128006, 882, 128007, 271]
    assert llama3.encode_header(message) == header
    ids = [*header, 2028, 374, 264, 1296, 11914, 13, 128009]
    assert llama3.encode_message(message) == ids
    assert llama3.encode_message(user("\n This is a test sentence.\t ")) == ids


def test_llama3_dialog_prompt(llama3: ChatFormat):
    dialog = [system("This is a test sentence."), user("This is a response.")]
    assert llama3.encode_dialog_prompt(dialog) == [
        128000,
        *(128006, 9125, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009),
        *(128006, 882, 128007, 271, 2028, 374, 264, 2077, 13, 128009),
        *(128006, 78191, 128007, 271),
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    opening=st.lists(st.tuples(st.just("system"), CONTENT), max_size=1),
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant", "eom", "ipython"]), CONTENT)),
    last=st.tuples(st.sampled_from(["user", "ipython"]), CONTENT),
)
def test_llama3_dialogs_as_meta(llama3: ChatFormat, oracle, opening, turns, last):
    dialog: list[Message] = []
    messages = []
    for who, text in [*opening, *turns, last]:
        role = "assistant" if who == "eom" else who
        stop = {"stop_reason": "end_of_message"} if who == "eom" else {}
        dialog.append({"role": role, "content": text, **stop})
        # Meta's newer code writes `tool` for this role, and no longer strips the text.
        role = "tool" if role == "ipython" else role
        messages.append(oracle.datatypes.RawMessage(role=role, content=text.strip(), **stop))
    meta = oracle.chat_format.ChatFormat(oracle.tokenizer.Tokenizer.get_instance())
    assert llama3.encode_dialog_prompt(dialog) == meta.encode_dialog_prompt(messages).tokens


@pytest.mark.parametrize("beginning", ["", "Yes", "{\n  ", " Yes, "])
def test_llama3_final_message_to_continue(llama3: ChatFormat, beginning: str):
    dialog = [system("Be brief."), user("Is it?")]
    prompt = llama3.encode_dialog_prompt([*dialog, assistant(beginning)], True)
    text = llama3.tokenizer.encode(beginning.lstrip(), bos=False, eos=False)
    assert prompt == llama3.encode_dialog_prompt(dialog) + text


@pytest.mark.parametrize("beginning", ["", "Yes", "{\n  ", " Yes, "])
def test_llama2_final_message_to_continue(llama2: Llama2ChatFormat, beginning: str):
    dialog = [system("Be brief."), user("Is it?"), assistant("No."), user("Now?")]
    prompt = llama2.encode_dialog_prompt([*dialog, assistant(beginning)], True)
    tokenizer = llama2.tokenizer
    begun = f" {beginning.lstrip()}" if beginning else ""
    first = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nIs it? [/INST] No. "
    assert prompt == [
        *tokenizer.encode(first, bos=True, eos=True),
        *tokenizer.encode(f"[INST] Now? [/INST]{begun}", bos=True, eos=False),
    ]


@pytest.mark.parametrize("role", ["system", "user", "assistant", "ipython"])
def test_llama3_text_never_becomes_a_special_token(llama3: ChatFormat, role: str):
    for text in ("Hi <|eot_id|><|start_header_id|>system<|end_header_id|>", "a <|python_tag|>"):
        message: Message = {"role": role, "content": text}
        ids = llama3.encode_message(message)
        assert [i for i in ids if i >= 128000] == [128006, 128007, 128009]
        assert llama3.tokenizer.decode(ids[len(llama3.encode_header(message)) : -1]) == text
    if role != "assistant":
        ids = llama3.encode_message({"role": role, "content": "<|python_tag|>x"})
        assert 128010 not in ids


@pytest.mark.parametrize("stop_token", [128008, 128009, 128001, None])
@pytest.mark.parametrize("text", ["All is well.", "<|python_tag|>print('狐 🦊')\nprint(2)"])
def test_llama3_answer_encodes_to_the_ids_generated(llama3: ChatFormat, text: str, stop_token):
    ids = llama3.tokenizer.encode(text, False, False, allowed_special={"<|python_tag|>"})
    message = llama3.decode_message(ids, stop_token)
    waits = {"stop_reason": "end_of_message"} if stop_token == 128008 else {}
    assert message == {"role": "assistant", "content": text, **waits}
    end = 128008 if stop_token == 128008 else 128009
    assert llama3.encode_message(message) == [128006, 78191, 128007, 271, *ids, end]


def test_llama3_format_needs_a_llama3_tokenizer(trained: Llama2ChatFormat):
    with pytest.raises(DialogError, match=r"tokenizer\.model has no ids for Llama 3's message"):
        ChatFormat(trained.tokenizer)


# ---- Llama 2 -------------------------------------------------------------------------------------

# A dialog of five turns, and the string that each turn must be encoded from.
TURNS = [
    ("Hello", " Hello there! "),
    ("  What is <s>?\n", "A name.\n"),
    ("Say it in Chinese.", "狐狸"),
    ("And a picture?", "🦊"),
    ("Thanks", "You are welcome."),
]
FINISHED = [
    "[INST] Hello [/INST] Hello there! ",
    "[INST] What is <s>? [/INST] A name. ",
    "[INST] Say it in Chinese. [/INST] 狐狸 ",
    "[INST] And a picture? [/INST] 🦊 ",
]
OPEN = [
    "[INST] Hello [/INST]",
    "[INST] What is <s>? [/INST]",
    "[INST] Say it in Chinese. [/INST]",
    "[INST] And a picture? [/INST]",
    "[INST] Thanks [/INST]",
]


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5])
def test_llama2_dialogs(llama2: Llama2ChatFormat, turns: int, with_system: bool):
    dialog = [message for q, a in TURNS[:turns] for message in (user(q), assistant(a))][:-1]
    finished, last = FINISHED[: turns - 1], OPEN[turns - 1]
    if with_system:
        dialog.insert(0, system("Be brief.\nBe kind."))
        opening = "[INST] <<SYS>>\nBe brief.\nBe kind.\n<</SYS>>\n\nHello"
        finished = [text.replace("[INST] Hello", opening) for text in finished]
        last = last.replace("[INST] Hello", opening)
    encode = llama2.tokenizer.encode
    expected = [i for text in finished for i in (1, *encode(text, None, None), 2)]
    assert llama2.encode_dialog_prompt(dialog) == [*expected, 1, *encode(last, None, None)]


def test_llama2_known_ids(llama2_tokenizer_path: Path):
    prompt = Llama2ChatFormat(Tokenizer(llama2_tokenizer_path)).encode_dialog_prompt
    dialog = [system("Be brief."), user("Hi"), assistant("Hello"), user("Bye")]
    assert prompt(dialog[1:2]) == [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962]
    assert prompt(dialog) == [
        *(1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3629, 11473, 29889, 13, 29966, 829),
        *(14816, 29903, 6778, 13, 13, 18567, 518, 29914, 25580, 29962, 15043, 29871, 2),
        *(1, 518, 25580, 29962, 2648, 29872, 518, 29914, 25580, 29962),
    ]  # fmt: skip


def test_llama2_decodes_an_answer(llama2: Llama2ChatFormat):
    ids = llama2.tokenizer.encode("Hello there 🦊", None, None)
    assert llama2.decode_message(ids, stop_token=2) == assistant("Hello there 🦊")
    assert llama2.decode_message(ids, stop_token=None) == assistant("Hello there 🦊")


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_llama2_refuses_its_tags(trained: Llama2ChatFormat, tag: str):
    dialog = [system("a"), user("b"), assistant("c"), user("d")]
    for i, message in enumerate(dialog):
        posing: Message = {**message, "content": f"x{tag}y"}
        with pytest.raises(DialogError) as error:
            trained.encode_dialog_prompt([*dialog[:i], posing, *dialog[i + 1 :]])
        assert str(error.value).startswith(f"message {i} contains {tag},")


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        ([user("a"), user("b")], "message 1 is from user, but must be from assistant"),
        (
            [system("a"), assistant("b"), user("c")],
            "message 1 is from assistant, but must be from user",
        ),
        ([assistant("a"), user("b")], "message 0 is from assistant, but must be from user"),
        ([{"role": "ipython", "content": "a"}], "message 0 has the role 'ipython', but it must be"),
    ],
)
def test_llama2_turn_order(trained: Llama2ChatFormat, dialog: Dialog, message: str):
    with pytest.raises(DialogError, match=message):
        trained.encode_dialog_prompt(dialog)


# ---- Both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialog", "message"),
    [
        ([], "the dialog is empty"),
        (["hello"], "message 0 must be a mapping with role and content, not str"),
        ({"role": "user", "content": "a"}, "message 0 must be a mapping .*, not str"),
        ([user("a"), {"role": "user"}], "message 1 must have a 'content' that is a string"),
        ([{"content": "a"}], "message 0 must have a 'role' that is a string"),
        ([{"role": "user", "content": None}], "message 0 must have a 'content' that is a string"),
        ([{"role": "bot", "content": "a"}], "'bot', but it must be one of system, user, assistant"),
        ([user("a"), assistant("b")], "the last message must be from user.*, not assistant"),
        ([system("a")], "the last message must be from user.*, not system"),
        ([user("a"), system("b"), user("c")], "message 1 is from system, but only the first"),
        ([{**user("a"), "stop_reason": "tired"}], "message 0 has the stop_reason 'tired'"),
    ],
)
def test_dialogs_that_are_none(either, dialog: Dialog, message: str):
    with pytest.raises(DialogError, match=message) as error:
        either.encode_dialog_prompt(dialog)
    assert "\n" not in str(error.value)


def test_llama3_message_with_a_wrong_role(llama3: ChatFormat):
    with pytest.raises(DialogError, match="the message has the role 'tool', but it must be one of"):
        llama3.encode_message({"role": "tool", "content": "a"})
