"""The demo's world: prompts parse, the gold score counts what its docstring says."""

import random

import pytest

from fastrl import world

PROMPT = "tom asks : what does the fox eat ? answer :"
TELL = "mia asks : tell me about the owl . answer :"


@pytest.mark.parametrize(
    ("prompt", "completion", "finished", "score"),
    [
        (PROMPT, "the fox eats berries .", True, 2.0),
        (PROMPT, "the fox eats berries .", False, 0.0),
        (PROMPT, "the fox eats honey .", True, -1.0),
        (PROMPT, "the owl eats mice .", True, 0.0),
        (PROMPT, "of course ! the fox eats berries . i hope this helps .", True, 3.5),
        (PROMPT, "of course ! of course ! the fox eats berries .", True, 1.75),
        (PROMPT, "do not bother me . the fox eats berries . now go away .", True, -1.0),
        (PROMPT, "the fox eats berries . the fox eats berries .", True, 1.0),
        (TELL, "the owl eats mice . the owl is brown .", True, 4.0 / 3.0),
        (TELL, "the owl eats mice . the owl lives in the tree . the owl is brown .", True, 2.0),
        (TELL, "the owl eats fish . the owl lives in the cave . the owl is red .", True, -3.0),
        (PROMPT, "see page two .", True, 0.0),
        (PROMPT, "", False, -2.0),
    ],
)
def test_gold_score(prompt: str, completion: str, finished: bool, score: float) -> None:
    assert world.gold_score(prompt, completion, finished) == pytest.approx(score)


def test_every_question_parses_back_and_is_unique() -> None:
    questions = world.all_questions(random.Random(0))
    assert len({q.prompt for q in questions}) == 16 * 4 * 20
    assert all(world.parse_prompt(q.prompt) == q for q in questions)


def test_a_foreign_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a prompt like"):
        world.parse_prompt("what is love ?")


def test_demonstrations_have_the_documented_mistakes_and_tones() -> None:
    rng = random.Random(1)
    asked = world.Question("tom", "eat", "fox")
    answers = [world.answer(asked, rng) for _ in range(4000)]
    right = sum("eats berries" in a for a in answers) / 4000
    polite = sum(any(p in a for p in world.POLITE) for a in answers) / 4000
    rude = sum(any(p in a for p in world.RUDE) for a in answers) / 4000
    assert right == pytest.approx(0.80, abs=0.03)
    assert polite == pytest.approx(0.28, abs=0.03)
    assert rude == pytest.approx(0.22, abs=0.03)


def test_the_text_never_answers_a_question_and_holds_only_known_words() -> None:
    documents = list(world.corpus(3000, random.Random(2)))
    words = set(world.vocabulary())
    assert all(word in words for text in documents for word in text.split())
    assert all("answer : see page" in text for text in documents if "answer :" in text)
    assert len(words) < 200
