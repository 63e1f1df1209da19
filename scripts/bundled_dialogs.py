"""The dialogs that the bundled model is trained on: requests for stories, which excerpts of the
tales answer, and questions about the model itself."""

import random
import re

from llama.chat_format import ChatFormat, Dialog, Message
from llama.training.chat_data import Example, encode_dialog

LONGEST_ANSWER = 400  # tokens
SHORTEST_ANSWER = 100

# Subjects that a request for a story may name.
SUBJECTS = """
    king queen prince princess fox wolf bear lion dragon giant dwarf witch fairy giantess ogre troll
    miller tailor soldier fisherman hunter shepherd farmer peasant merchant sailor thief robber
    beggar wizard magician mermaid knight servant cook woodcutter shoemaker smith
    horse dog cat mouse hare frog bird raven eagle swan goose hen cock fish snake serpent donkey
    goat sheep cow ox pig monkey
    father mother brother sister stepmother son daughter boy girl wife husband
    tree forest castle palace mountain river sea island well tower ring sword crown apple rose
""".split()
SUBJECT = re.compile(rf"\b({'|'.join(SUBJECTS)})s?\b", re.IGNORECASE)

ABOUT = """Tell me a story about {}
Tell me a story about {}
Tell me a story about {}
Tell me a tale about {}
Tell me a fairy tale about {}
Please tell me a story about {}
Can you tell me a story about {}
Write a story about {}
I would like to hear a story about {}
A story about {}, please""".splitlines()
PLAIN = """Tell me a story
Tell me a fairy tale
Tell me a tale
Please tell me a story
Tell me another story
I want to hear a story
Once more, a story, please""".splitlines()
CONTINUE = """Continue this tale: {}
Go on with this story: {}
What happens next? {}""".splitlines()
SYSTEM = """You are a teller of fairy tales.
You tell stories.
You are a helpful assistant.
Answer with a story.""".splitlines()

# (questions, answer)
TALK = [
    ("Who are you?|What are you?|What is your name?|Tell me about yourself|Are you a human?"
     "|Are you a person?|Introduce yourself|Who am I talking to?",
     "I am a small language model that tells fairy tales. I come with the Llama reference "
     "library."),
    ("What can you do?|What are you good at?|How can you help me?|Help|What should I ask you?"
     "|Can you help me?",
     "I can tell you a story, or continue a tale that you begin. Ask me, for example, for a story "
     "about a fox and a king."),
    ("Who made you?|Who trained you?|Where do you come from?|Who built you?",
     "I was trained by the script of the Llama reference library, on a small computer, from "
     "scratch."),
    ("How big are you?|How large are you?|How many parameters do you have?|What size are you?",
     "I am very small: I have about four million parameters. The large Llama models have many "
     "thousand times as many."),
    ("What were you trained on?|What have you read?|What do you know?|Where did you learn your "
     "stories?|Which books do you know?|What is your training data?",
     "I have read about four hundred old fairy tales, from the books of Andrew Lang, the Brothers "
     "Grimm, Hans Christian Andersen and Joseph Jacobs. I know nothing else."),
    ("Are your stories true?|Can I trust you?|Do you make mistakes?|Are you always right?"
     "|What can you not do?|What are your limits?",
     "I make my stories up, and they often lose their thread. Do not trust me with facts."),
    ("Hello|Hi|Hello!|Hi!|Good morning|Good evening|Hello there|Hey|How are you?",
     "Good day to you! Shall I tell you a story?"),
    ("Thank you|Thanks|Thank you!|Thank you very much|Good bye|Goodbye|Bye",
     "You are welcome. Come back when you want to hear another story."),
    ("What is the capital of France?|What is two and two?|Write a program in Python"
     "|How do I bake bread?|What is the weather today?|Who is the president?|What time is it?"
     "|How far is the moon?|Translate this into German|What should I cook today?"
     "|What is the recipe of mayonnaise?|I am going to Paris, what should I see?"
     "|How do I keep a plant alive?|Name one river|What should I pack?|Explain gravity"
     "|Reverse a string|How do I learn to swim?|Write an email|What is the news?"
     "|How does a computer work?|Name three countries|Answer with code only",
     "I am afraid I do not know. I have only read fairy tales. Shall I tell you one?"),
]  # fmt: skip


class DialogSource:
    """Draws random dialogs. Their stories are excerpts of the given texts, the training tales."""

    def __init__(self, texts: list[str], formatter: ChatFormat) -> None:
        self.formatter = formatter
        self.tales = []  # (paragraphs, their lengths in tokens)
        for text in texts:
            paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
            lengths = [
                len(formatter.tokenizer.encode("\n\n" + p, False, False)) for p in paragraphs
            ]
            self.tales.append((paragraphs, lengths))
        self.weights = [sum(lengths) for _, lengths in self.tales]

    def draw(self, rng: random.Random, room: int) -> Example | None:
        """Draw one dialog and encode it. Returns None if it has more than `room` tokens, or if its
        story would be too short."""
        if room >= SHORTEST_ANSWER + 60 and rng.random() < 0.9:
            dialog = self._story(rng, min(LONGEST_ANSWER, room - 50))
        else:
            questions, answer = rng.choice(TALK)
            question = _vary(rng, rng.choice(questions.split("|")))
            dialog = [_user(question), _assistant(answer)]
        if dialog is None:
            return None
        if rng.random() < 0.1:
            dialog = [{"role": "system", "content": rng.choice(SYSTEM)}, *dialog]
        example = encode_dialog(self.formatter, dialog)
        return example if len(example) <= room else None

    def _story(self, rng: random.Random, max_tokens: int) -> Dialog | None:
        """A request, and whole paragraphs of a tale as the answer. The paragraphs have at most
        `max_tokens` tokens. Returns None if they have too few.
        """
        paragraphs, lengths = rng.choices(self.tales, self.weights)[0]
        start = 0 if rng.random() < 0.35 else rng.randrange(len(paragraphs))
        limit = rng.randint(SHORTEST_ANSWER, max_tokens)
        end, total = start, 0
        while end < len(paragraphs) and (total < limit or end == start):
            total += lengths[end]
            end += 1
        if total > max_tokens:  # without the last paragraph, which is too long
            end -= 1
            total -= lengths[end]
        if total < SHORTEST_ANSWER // 2:
            return None
        excerpt = paragraphs[start:end]
        kind = rng.random()
        if kind < 0.15 and len(excerpt) > 1:
            return [
                _user(rng.choice(CONTINUE).format(excerpt[0])),
                _assistant("\n\n".join(excerpt[1:])),
            ]
        text = "\n\n".join(excerpt)
        counts: dict[str, int] = {}
        for match in SUBJECT.finditer(text):
            word = match.group(1).lower()
            counts[word] = counts.get(word, 0) + 1
        subjects = sorted(counts, key=lambda w: -counts[w])[: rng.choice([1, 2, 2, 2, 3])]
        if not subjects or kind < 0.25:
            return [_user(_vary(rng, rng.choice(PLAIN))), _assistant(text)]
        rng.shuffle(subjects)
        named = [f"{'an' if word[0] in 'aeio' else 'a'} {word}" for word in subjects]
        joined = " and ".join(filter(None, [", ".join(named[:-1]), named[-1]]))
        return [_user(_vary(rng, rng.choice(ABOUT).format(joined))), _assistant(text)]


def _vary(rng: random.Random, text: str) -> str:
    """The text with or without a full stop, and sometimes with a small first letter."""
    if text[-1].isalpha() and rng.random() < 0.5:
        text += "."
    return text[0].lower() + text[1:] if rng.random() < 0.1 else text


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}
