"""The files beside a page: its key, which names the model on each side, and the votes of a voter."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, StringConstraints, ValidationError

from mobius_train.config_sections import Section
from mobius_train.errors import MobiusError
from mobius_train.files import read_small

Question = Literal["text_alignment", "frame_quality", "motion_quality"]
# The aspects that people compared for Vchitect-2.0, arXiv 2501.08453.
QUESTIONS: dict[Question, str] = {
    "text_alignment": "Which clip matches the text better?",
    "frame_quality": "Which clip has the better single frames?",
    "motion_quality": "Which clip has the better motion?",
}
Answer = Literal["left", "right", "none"]
NO_DIFFERENCE: Answer = "none"
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100)]


def _all_questions(answers: dict[Question, Answer]) -> dict[Question, Answer]:
    missing = [question for question in QUESTIONS if question not in answers]
    if missing:
        raise ValueError(f"no answer to {', '.join(missing)}")
    return answers


class PairKey(Section):
    """A pair of the page and its sides."""

    pair: str = Field(description="hash of the pair's pictures")
    prompt: str
    left: Literal["first", "second"] = Field(description="the model whose clip is on the left")


class Sides(Section):
    """The two models, and the pairs in the order of the page."""

    first: str
    second: str
    seed: int
    pairs: tuple[PairKey, ...]

    def page_id(self) -> str:
        """A hash of the key: nobody can change the sides after the votes."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]


class Key(Section):
    """The contents of the key's file."""

    page: str
    sides: Sides


class Vote(Section):
    """A voter's answers on a pair."""

    pair: str
    answers: Annotated[dict[Question, Answer], AfterValidator(_all_questions)]


class Ballot(Section):
    """The file that the page exports: all votes of a voter."""

    page: str
    voter: Name
    votes: tuple[Vote, ...]


Record = TypeVar("Record", bound=Section)


def read_key(path: Path) -> Key:
    """Read and verify a key.

    Raises:
        MobiusError: the file is missing, not a key, or was changed.
    """
    key = _read(Key, path, "the key of a page")
    if key.page != key.sides.page_id():
        raise MobiusError(f"{path} was changed: its sides do not belong to the page {key.page}. Restore the original")
    return key


def read_ballot(path: Path, key: Key) -> Ballot:
    """Read the votes of a voter.

    Raises:
        MobiusError: the file is missing, not a ballot, of another page, or votes on an unknown pair or twice on one.
    """
    ballot = _read(Ballot, path, "votes that a page exported")
    if ballot.page != key.page:
        raise MobiusError(f"{path} has votes on the page {ballot.page}, but the key is of {key.page}: give its own key")
    if not ballot.votes:
        raise MobiusError(f"{path} has no votes: leave it out")
    pairs = [vote.pair for vote in ballot.votes]
    unknown = sorted(set(pairs) - {pair.pair for pair in key.sides.pairs})
    if unknown:
        raise MobiusError(f"{path} was changed: the page has no pair {', '.join(unknown)}. Fetch the original file")
    twice = sorted({pair for pair in pairs if pairs.count(pair) > 1})
    if twice:
        raise MobiusError(f"{path} was changed: it votes twice on the pair {', '.join(twice)}. Fetch the original file")
    return ballot


def _read(kind: type[Record], path: Path, contents: str) -> Record:
    try:
        return kind.model_validate_json(read_small(path))
    except OSError as error:
        raise MobiusError(f"cannot read {path}: {error.strerror}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "the file"
        raise MobiusError(f"{path} is not {contents}: {place}: {problem['msg']}. Fetch the original file") from error
