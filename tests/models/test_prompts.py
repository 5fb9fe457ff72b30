"""Models tell how they are prompted; objectives narrow that to what they train."""

import dataclasses

import numpy as np
import pytest
from handmade import Letters

from capvl.errors import UserError
from capvl.models.captioner import CaptionerOptions
from capvl.models.git import GitOptions
from capvl.models.two_towers import TwoTowersOptions
from capvl.objectives.cappa import CapPa
from capvl.objectives.contrastive import Contrastive
from capvl.objectives.git import Git
from capvl.objectives.scst import Scst

SMALL = dict(encoder="w8d1h1m8/8", res=8, vocab=40)
GIT = GitOptions(**SMALL, text="w8d1h1m8", start=2, length=8)


@pytest.mark.parametrize(
    "options, objective",
    [
        (CaptionerOptions(**SMALL), CapPa()),
        (TwoTowersOptions(**SMALL, decoder_layers=1), Contrastive()),
        (GIT, Scst()),
    ],
)
def test_captioners_have_no_prompt_and_no_other_task(options, objective):
    for prompt in (options.prompt, lambda *task: objective.prompt(options, *task)):
        tokens = prompt(Letters(), "caption")
        assert tokens.shape == (0,) and tokens.dtype == np.int32
        if prompt != options.prompt or options is not GIT:
            with pytest.raises(UserError, match="trained (to caption )?.*the task 'answer'"):
                prompt(Letters(), "answer", "a")


def test_git_is_asked_in_words():
    assert GIT.prompt(Letters(), "answer", "ab").tolist() == [5, 6]
    assert GIT.prompt(Letters(), "answer", "abcdefghij").tolist() == [5, 6, 7, 8, 9, 10]
    for task in ("caption", "classify", "read"):
        assert not len(GIT.prompt(Letters(), task))
    with pytest.raises(UserError, match="'dance'; it knows answer, caption, classify, read"):
        GIT.prompt(Letters(), "dance")


def test_an_objective_knows_its_tasks_and_its_words():
    objective = Git(tasks=("caption",), prompts=(("read", "ab"),))
    assert objective.prompt(GIT, Letters(), "read").tolist() == [5, 6]
    with pytest.raises(UserError, match="wasn't trained for the task 'answer'; it knows caption, read"):
        objective.prompt(GIT, Letters(), "answer", "a")


def test_a_tokenizer_that_begins_texts_otherwise():
    @dataclasses.dataclass
    class Begins:
        path = "words.txt"
        start_id: int | None

    GIT.check_tokenizer(Begins(2))
    GIT.check_tokenizer(Begins(None))
    with pytest.raises(UserError, match="'words.txt' begins texts with id 7, and model.start=2"):
        GIT.check_tokenizer(Begins(7))
