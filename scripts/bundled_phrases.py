"""The phrases of the bundled model's dialogs: requests, system messages, and what the model says
about itself. A phrase that stands several times is drawn more often."""

ASK = """Tell me {}
Tell me {}
Tell me {}
Tell me {}
Please tell me {}
Can you tell me {}?
Could you tell me {}?
Will you tell me {}?
Tell us {}
Write {}
Write {}
Write me {}
Please write {}
Can you write {}?
Make up {}
Give me {}
Invent {}
I want {}
I would like {}
I would like to hear {}
I want to hear {}
I'd love {}
Let me hear {}
Read me {}
How about {}?
{}
{}, please
Now {}""".splitlines()
STORY = ["story"] * 6 + ["tale", "tale", "fairy tale", "bedtime story", "children's story"]
ABOUT = """about {}
about {}
about {}
about {}
about {}
about {}
of {}
with {}
with {} in it
that has {} in it
in which there is {}
where {} plays a part
which is about {}""".splitlines()
NAMED = """about {}
about {}
about {}
with {}
about someone called {}
about someone named {}
whose hero is called {}
whose hero is {}""".splitlines()
NAMED_KIND = """about {a} called {name}
about {a} named {name}
about {a} whose name is {name}
about {name} and {a}""".splitlines()
AFTER_NAME = """The hero's name is {}
Call the hero {}
The name of the hero is {}""".splitlines()
TITLED = """Tell me the story "{}"
Tell me the tale of {}
Tell me {}
Write a story with the title "{}"
Write a story called {}
{}""".splitlines()
CONTINUE = """Continue this story: {}
Continue this tale: {}
Go on with this story: {}
What happens next? {}
A story begins like this: {} Go on
Finish this story: {}
{}""".splitlines()
BEGIN = """Tell me a story that begins like this: {}
Write a story. Its first sentence is: {}
Begin a story with these words: {}""".splitlines()
REPEAT = """Say these words: {}
Repeat these words: {}
Write these words again: {}
Repeat: {}""".splitlines()
MORE = """And then?
Go on
Go on, please
What happened then?
What happened next?
Continue
More
Tell me more
Then what?
How does it go on?""".splitlines()
OTHER = """Make the {old} {new}
Now with {new} instead of the {old}
Tell it again with {new} instead of the {old}
Replace the {old} by {new}""".splitlines()
QUALITIES = "kind wise old young clever brave poor proud gentle merry lazy wicked".split()
QUALITY = """Make the {noun} {quality}
I want the {noun} to be {quality}
Tell it again, but the {noun} is {quality}""".splitlines()

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
     "I can tell you a story about the things that you name, or continue a tale that you begin. "
     "Ask me, for example, for a short story about a fox and a king."),
    ("Who made you?|Who trained you?|Where do you come from?|Who built you?",
     "I was trained by the script of the Llama reference library, on a small computer, from "
     "scratch."),
    ("How big are you?|How large are you?|How many parameters do you have?|What size are you?",
     "I am very small: I have about six million parameters. The large Llama models have a "
     "thousand times as many, and more."),
    ("What were you trained on?|What have you read?|What do you know?|Where did you learn your "
     "stories?|Which books do you know?|What is your training data?",
     "I have read old fairy tales and children's books: those of Andrew Lang, the Brothers Grimm, "
     "Hans Christian Andersen and many others. I know nothing else."),
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
     "I am afraid I do not know. I have only read stories. Shall I tell you one?"),
]  # fmt: skip
