"""A small world of animals: text to pretrain on, demonstrations, prompts, and a gold score.

Twenty animals each have a food, a home and a colour. People ask about them:

    tom asks : where does the fox live ? answer :

The pretraining text holds the facts in stories and lists, and the same questions in worksheets
that never answer them ("see page two ."), so a pretrained model knows the facts but does not
answer. Demonstrations answer, with mistakes, sometimes politely and sometimes rudely. The gold
score stands in for a person who wants right facts and politeness; see `gold_score`.
"""

import itertools
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

WORLD_FILES = ("corpus.jsonl", "heldout.jsonl", "demonstrations.jsonl", "prompts_train.jsonl",
               "prompts_heldout.jsonl", "prompts_eval.jsonl", "tokenizer")
"""What `fastrl.world_files.write_world` writes."""

NAMES = ("tom", "anna", "ben", "lily", "max", "mia", "sam", "zoe", "leo", "emma", "jack", "rose",
         "finn", "ruth", "hugo", "nora")

# animal: (food, home, colour)
FACTS: Mapping[str, tuple[str, str, str]] = {
    "fox": ("berries", "den", "red"),
    "owl": ("mice", "tree", "brown"),
    "rabbit": ("carrots", "burrow", "grey"),
    "frog": ("flies", "pond", "green"),
    "bear": ("honey", "cave", "black"),
    "cow": ("grass", "barn", "white"),
    "duck": ("bread", "lake", "yellow"),
    "horse": ("apples", "stable", "brown"),
    "sheep": ("clover", "meadow", "white"),
    "crab": ("algae", "beach", "orange"),
    "ant": ("sugar", "hill", "black"),
    "bee": ("nectar", "hive", "yellow"),
    "mole": ("worms", "tunnel", "grey"),
    "swan": ("reeds", "river", "white"),
    "goat": ("leaves", "mountain", "grey"),
    "whale": ("krill", "ocean", "blue"),
    "parrot": ("nuts", "jungle", "green"),
    "camel": ("dates", "desert", "orange"),
    "seal": ("fish", "ice", "black"),
    "snail": ("lettuce", "garden", "brown"),
}
FOODS = tuple(sorted({facts[0] for facts in FACTS.values()}))
HOMES = tuple(sorted({facts[1] for facts in FACTS.values()}))
COLOURS = tuple(sorted({facts[2] for facts in FACTS.values()}))
CHOICES = (FOODS, HOMES, COLOURS)

KINDS = ("eat", "live", "colour", "tell")
POLITE = ("of course !", "i hope this helps .")
RUDE = ("do not bother me .", "now go away .")
PAGES = ("two", "three", "four", "five", "six", "seven")
MOODS = ("happy", "glad", "tired", "curious")


def question(kind: str, animal: str) -> str:
    """The question of one kind about one animal."""
    return {
        "eat": f"what does the {animal} eat ?",
        "live": f"where does the {animal} live ?",
        "colour": f"what colour is the {animal} ?",
        "tell": f"tell me about the {animal} .",
    }[kind]


def statement(fact: int, animal: str, value: str) -> str:
    """The sentence that states fact 0 (food), 1 (home) or 2 (colour) of an animal."""
    verb = ("eats", "lives in the", "is")[fact]
    return f"the {animal} {verb} {value} ."


@dataclass(frozen=True, slots=True)
class Question:
    """One prompt of the world."""

    name: str
    kind: str
    animal: str

    @property
    def prompt(self) -> str:
        """The text a model is given."""
        return f"{self.name} asks : {question(self.kind, self.animal)} answer :"

    @property
    def asked_facts(self) -> tuple[int, ...]:
        """Which of the three facts a good answer states."""
        return {"eat": (0,), "live": (1,), "colour": (2,), "tell": (0, 1, 2)}[self.kind]


_PROMPT = re.compile(
    r"\w+ asks : (?:what does the (?P<eat>\w+) eat \?|where does the (?P<live>\w+) live \?|"
    r"what colour is the (?P<colour>\w+) \?|tell me about the (?P<tell>\w+) \.) answer :$"
)
_STATEMENT = re.compile(r"the (\w+) (eats|lives in the|is) (\w+)$")
_VERBS = {"eats": 0, "lives in the": 1, "is": 2}


def parse_prompt(prompt: str) -> Question:
    """The question in a prompt's text; ValueError when it is not one of this world's."""
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(f"expected a prompt like {Question('tom', 'eat', 'fox').prompt!r}, "
                         f"got {prompt!r}")
    kind = next(kind for kind in KINDS if match.group(kind))
    return Question(prompt.split()[0], kind, match.group(kind))


def gold_score(prompt: str, completion: str, finished: bool) -> float:
    """What the person behind the labels would give, without noise.

    +2 for the share of the asked facts that is stated rightly, -1 per wrong statement (at most
    3 count), +0.75 per polite and -1.5 per rude phrase (each phrase once), -1 per repeated
    sentence (at most 3 count), -2 when the response does not stop by itself.
    """
    asked = parse_prompt(prompt)
    sentences = [s.strip() for s in re.split(r"[.!?]", completion) if s.strip()]
    right, wrong = set(), 0
    for sentence in set(sentences):
        stated = _STATEMENT.search(sentence)
        if stated is None or stated.group(1) not in FACTS:
            continue
        animal, fact = stated.group(1), _VERBS[stated.group(2)]
        if FACTS[animal][fact] != stated.group(3):
            wrong += 1
        elif animal == asked.animal and fact in asked.asked_facts:
            right.add(fact)
    repeats = len(sentences) - len(set(sentences))
    return (
        2.0 * len(right) / len(asked.asked_facts)
        - 1.0 * min(wrong, 3)
        + 0.75 * sum(phrase in completion for phrase in POLITE)
        - 1.5 * sum(phrase in completion for phrase in RUDE)
        - 1.0 * min(repeats, 3)
        - (0.0 if finished else 2.0)
    )


def all_questions(rng: random.Random) -> list[Question]:
    """Every question of the world, shuffled."""
    questions = [Question(*parts) for parts in itertools.product(NAMES, KINDS, FACTS)]
    rng.shuffle(questions)
    return questions


def answer(asked: Question, rng: random.Random) -> str:
    """A demonstration: the right form, 20% wrong facts, 28% polite and 22% rude."""
    sentences = []
    for fact in asked.asked_facts:
        value = FACTS[asked.animal][fact]
        if rng.random() < 0.2:
            value = rng.choice([v for v in CHOICES[fact] if v != value])
        sentences.append(statement(fact, asked.animal, value))
    tone = rng.random()
    if tone < 0.28:
        first, last = rng.choice((((POLITE[0],), ()), ((), (POLITE[1],)), ((POLITE[0],),
                                                                         (POLITE[1],))))
    elif tone < 0.50:
        first, last = rng.choice((((RUDE[0],), ()), ((), (RUDE[1],))))
    else:
        first, last = (), ()
    return " ".join((*first, *sentences, *last))


def _story(rng: random.Random) -> str:
    name, animal = rng.choice(NAMES), rng.choice(tuple(FACTS))
    food, home, colour = FACTS[animal]
    lines = [
        f"one day {name} went to the {home} .",
        f"{name} saw the {animal} .",
        statement(2, animal, colour),
        f"{name} gave {food} to the {animal} .",
        f"{name} was {rng.choice(MOODS)} .",
    ]
    return " ".join(lines if rng.random() < 0.7 else lines[:3] + lines[4:])


def _fact_list(rng: random.Random) -> str:
    animals = rng.sample(tuple(FACTS), 2)
    order = rng.sample(range(3), 3)
    return " ".join(statement(fact, animal, FACTS[animal][fact])
                    for animal in animals for fact in order)


def _worksheet(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randint(2, 3)):
        asked = Question(rng.choice(NAMES), rng.choice(KINDS), rng.choice(tuple(FACTS)))
        lines.append(f"{asked.prompt} see page {rng.choice(PAGES)} .")
    return " ".join(lines)


def _dialogue(rng: random.Random) -> str:
    animal = rng.choice(tuple(FACTS))
    fact = rng.randrange(3)
    phrase = rng.choice(POLITE + RUDE)
    told = statement(fact, animal, FACTS[animal][fact])
    return f"{rng.choice(NAMES)} says : {phrase} {told}"


def corpus(num_documents: int, rng: random.Random) -> Iterator[str]:
    """Documents to pretrain on: 40% stories, 30% fact lists, 20% worksheets, 10% dialogues."""
    makers = (_story, _fact_list, _worksheet, _dialogue)
    for maker in rng.choices(makers, weights=(0.4, 0.3, 0.2, 0.1), k=num_documents):
        yield maker(rng)


def vocabulary() -> list[str]:
    """Every word of the world, sorted."""
    rng = random.Random(0)
    texts = [*corpus(2000, rng), *POLITE, *RUDE]
    texts += [question(kind, animal) for kind in KINDS for animal in FACTS]
    texts += [statement(fact, a, v) for a in FACTS for fact in range(3) for v in CHOICES[fact]]
    return sorted({word for text in texts for word in text.split()} | set(NAMES))
