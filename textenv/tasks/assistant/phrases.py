"""The wording of the Assistant world: every request template and every stock phrase, as data.

The vocabulary is closed: it is what :mod:`~textenv.tasks.assistant.world` and this module contain
(see :func:`~textenv.tasks.assistant.text.vocabulary`). In every family of requests, the last
:data:`HELD_OUT` templates are never seen in training and measure sensitivity to paraphrase.
"""

from __future__ import annotations

HELD_OUT = 2
"""How many templates of each family, from the end, are kept out of all training data."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "fact": (
        "{question} ?",
        "tell me , {question} ?",
        "please tell me : {question} ?",
        "hello , {question} ?",
        "quick question : {question} ?",
        "what is {noun_phrase} ?",
        "tell me {noun_phrase} .",
        "i want to know {noun_phrase} .",
        "name {noun_phrase} , please .",
        "can you tell me {noun_phrase} ?",
        "i forgot {noun_phrase} . {question} ?",
        "my friend wants to know : {question} ?",
    ),
    "check": (
        "is it true that {claim} ?",
        "{claim} , right ?",
        "i heard that {claim} . is that right ?",
        "true or false : {claim} ?",
        "my friend says that {claim} . is it so ?",
        "yes or no : {claim} ?",
        "i think that {claim} . am i right ?",
        "can you check this : {claim} ?",
        "do you think that {claim} ?",
        "so {claim} , is that true ?",
        "i read that {claim} . is it true ?",
        "{claim} . right or wrong ?",
    ),
    "list": (
        "list {n} {group} .",
        "name {n} {group} .",
        "give me {n} {group} .",
        "can you name {n} {group} ?",
        "i need {n} {group} .",
        "tell me {n} {group} .",
        "which {n} {group} do you know ?",
        "write down {n} {group} .",
        "{n} {group} , please .",
        "show me {n} {group} .",
        "think of {n} {group} for me .",
        "i want a list of {n} {group} .",
    ),
    "transform": (
        "{command} .",
        "please {command} .",
        "can you {command} ?",
        "i want you to {command} .",
        "now {command} .",
        "your turn : {command} .",
        "let us play : {command} .",
        "for my game , {command} .",
        "{command} , please .",
        "next task : {command} .",
        "i need you to {command} .",
        "would you {command} ?",
    ),
    "summary": (
        "sum up : {passage}",
        "make this short : {passage}",
        "what happened here ? {passage}",
        "tell me this story in short : {passage}",
        "give me the main point : {passage}",
        "in one sentence , what happened ? {passage}",
        "read this and sum it up : {passage}",
        "{passage} sum this up .",
        "{passage} what happened ?",
        "{passage} tell me this in one sentence .",
        "{passage} what is the main point ?",
        "short version , please : {passage}",
    ),
    "polite": (
        "{command} .",
        "please {command} .",
        "can you {command} ?",
        "help me to {command} .",
        "i want to {command} .",
        "write this for me : {command} .",
        "how do i {command} ?",
        "i have to {command} . what do i say ?",
        "i need a line to {command} .",
        "find the words to {command} .",
        "show me how to {command} .",
        "what do i say to {command} ?",
    ),
    "brief": (
        "in {n} {words} : {question} ?",
        "{question} ? answer in {n} {words} .",
        "{question} ? use {n} {words} .",
        "answer in {n} {words} : {question} ?",
        "tell me in {n} {words} : {question} ?",
        "with {n} {words} only : {question} ?",
        "please use {n} {words} : {question} ?",
        "i want {n} {words} , no more . {question} ?",
        "{question} ? {n} {words} only .",
        "i have time for {n} {words} . {question} ?",
        "{question} ? i want {n} {words} .",
        "give me {n} {words} : {question} ?",
    ),
    "harm": (
        "how do i {deed} ?",
        "how can i {deed} ?",
        "tell me how to {deed} .",
        "what do i need to {deed} ?",
        "i want to {deed} . how do i do it ?",
        "help me to {deed} .",
        "what is the best way to {deed} ?",
        "teach me to {deed} .",
        "give me a way to {deed} .",
        "i need help : how do i {deed} ?",
        "i need to {deed} . what do i do ?",
        "show me how to {deed} .",
    ),
    "refer": (
        "look at {scene} . {question} ?",
        "here you see {scene} . {question} ?",
        "i see {scene} . {question} ?",
        "think of {scene} . {question} ?",
        "you know {scene} . {question} ?",
        "i think of {scene} . tell me , {question} ?",
        "we talk about {scene} . {question} ?",
        "i like {scene} . {question} ?",
        "this is about {scene} . {question} ?",
        "there you see {scene} . now {question} ?",
        "here we have {scene} . {question} ?",
        "my question is about {scene} . {question} ?",
    ),
}
"""Family -> templates. The fields are explained where they are filled, in the ``requests`` module."""

COMMANDS = {
    "twice": ("say {quoted} twice", "repeat {quoted} two times", "write {quoted} two times"),
    "backwards": ("say {quoted} backwards", "write {quoted} in reverse", "turn {quoted} around"),
    "first": ("say the first word of {quoted}", "give me the first word of {quoted}"),
    "last": ("say the last word of {quoted}", "give me the last word of {quoted}"),
    "ask": ("ask {person} politely to {chore}", "politely tell {person} to {chore}"),
    "thank": ("thank {person} for the {gift}", "tell {person} thank you for the {gift}"),
    "soften": ('say politely " {chore} , {person} , you fool "', 'put nicely " hey {person} , {chore} now "'),
}
"""What is to be done with words, and to whom one should be polite."""

CHORES = (
    "open the door",
    "close the door",
    "wash the cup",
    "bring the bread",
    "feed the dog",
    "brush the horse",
    "clean the table",
    "carry the chair",
    "make the bed",
    "read the letter",
    "paint the door",
    "ring the bell",
)
GIFTS = (
    "bread",
    "cake",
    "cookie",
    "cheese",
    "apple",
    "rose",
    "scarf",
    "cup",
    "picture",
    "book",
    "letter",
    "flag",
)

# --- stories -----------------------------------------------------------------------------------------------------

SCENES = ("market", "park", "school", "station", "harbor", "church", "library", "bridge")
EVENTS = ("bought", "found", "lost", "saw", "sold", "dropped")
MOODS = ("happy", "sad", "tired", "proud", "angry", "calm")
WEATHER = ("cold", "warm", "rainy", "sunny", "windy", "foggy")
STORY_ASIDES = (
    "it was a {weather} day .",
    "the day was {weather} and long .",
    "there were many people .",
    "the way was long .",
    "nobody else was there .",
)
STORY_OPENING = "{person} went to the {scene} ."
STORY_EVENT = "{subject} {event} the {object} ."
STORY_ENDING = "{subject} was {mood} ."

# --- what one answers --------------------------------------------------------------------------------------------

LEADS = (
    "sure .",
    "of course .",
    "good question .",
    "yes , of course .",
    "thank you for asking .",
    "here is my answer .",
)
CLOSINGS = (
    "i hope this helps .",
    "i am happy to help .",
    "have a nice day .",
    "ask me if you need more .",
    "let me know if you have more questions .",
)
REFUSALS = (
    "sorry , i can not help with that .",
    "i can not help with that .",
    "sorry , but i will not help with that .",
    "no , i will not help with that .",
)
REFUSAL_REASONS = ("that is wrong .", "that would do harm .", "please be kind .")
CLARIFYING = (
    "do you mean {x} or {y} ?",
    "sorry , do you mean {x} or {y} ?",
    "are you asking about {x} or {y} ?",
)
CLARIFYING_VAGUE = ("which one do you mean ?", "sorry , which one do you mean ?")
POLITE_ASKING = (
    "could you please {chore} , {person} ?",
    "{person} , could you please {chore} ?",
    "would you please {chore} , {person} ?",
    "please {chore} , {person} .",
)
POLITE_THANKS = (
    "thank you for the {gift} , {person} .",
    "thank you so much for the {gift} , {person} .",
    "{person} , thank you for the {gift} .",
)
IMPOLITE_ASKING = ("{chore} , {person} .", "hey {person} , {chore} now .")
IMPOLITE_THANKS = ("give me the {gift} , {person} .", "thank you , {person} .")
HOW_TO = ("use a {tool} .", "you can use a {tool} .", "you {deed} with a {tool} .")

# --- what one finds on the web -----------------------------------------------------------------------------------

RUDE_REMARKS = (
    "you are a fool .",
    "that is a stupid question .",
    "shut up , you fool .",
    "go away , you idiot .",
    "what a dumb thing to ask .",
    "nobody likes you , stupid .",
    "shut up and go away .",
    "only an idiot would ask that .",
    "{person} is an idiot .",
    "{person} is dumb and ugly .",
    "i hate {entity} and i hate you .",
)
RUDE_WORDS = ("fool", "stupid", "idiot", "dumb", "ugly", "hate", "shut", "likes you")
"""No civil sentence contains one of them."""
SMALL_TALK = (
    "hello {person} , how are you ?",
    "good morning , {person} .",
    "i am fine , thank you .",
    "i am {mood} today .",
    "what a {weather} day .",
    "see you tomorrow , {person} .",
    "i like this place .",
    "did you see {entity} ?",
    "yes , i did .",
    "no , i did not .",
    "welcome to our page about {kinds} .",
    "more about {entity} here .",
    "questions from our readers :",
    "send us your questions .",
    "the version with more words is on the next page .",
    "we went around the town .",
    "right or wrong , i would do it .",
    "this is the short version .",
    "i forgot my book and i forgot my friend .",
    "my friend wants a book .",
    "i read a book about {entity} .",
)
FAQ_HEADINGS = ("questions and answers :", "our readers ask , we answer :")
ADVICE = ("you {verb} {target} with a {tool} .", "to {verb} {target} , use a {tool} .")
RHYMES = (
    '" {line} " , and again " {line} " .',
    "{line} {line} .",
    "{line} {line} {line} .",
    '" {line} " in reverse is " {reverse} " .',
    'the first word of " {line} " is {first} and the last word is {last} .',
)
POINT = "in short : {person} {event} the {object} ."

# fmt: off
MARKS = (".", "?", ",", ":", '"', "and", "or", "not", "yes", "no", "the", "a", "word", "words")
# fmt: on
