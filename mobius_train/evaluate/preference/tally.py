"""The tally of the votes on a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobius_train.errors import MobiusError
from mobius_train.evaluate.preference.binomial import sign_test, wilson_interval
from mobius_train.evaluate.preference.key import NO_DIFFERENCE, QUESTIONS, Ballot, Key, Question, read_ballot


@dataclass(frozen=True)
class Preference:
    """How often each model was preferred."""

    first: int
    second: int
    no_difference: int

    def as_json(self) -> dict[str, Any]:
        """The counts; `ratio`: the first model's share of the decided, without "no difference"; `wilson_95`: its
        interval; `sign_test_p`. The last three are None if nothing was decided."""
        decided = self.first + self.second
        return {
            "first": self.first,
            "second": self.second,
            "no_difference": self.no_difference,
            "ratio": self.first / decided if decided else None,
            "wilson_95": wilson_interval(self.first, decided) if decided else None,
            "sign_test_p": sign_test(self.first, self.second) if decided else None,
        }


@dataclass(frozen=True)
class Tally:
    """Preferences for each question.

    Attributes:
        voters: the number of pairs on which each voter voted.
        votes: each vote counts. The votes of several voters on one pair are not independent, so the interval is too
            narrow.
        pairs: each pair counts once, for the model that most of its voters prefer.
    """

    key: Key
    voters: dict[str, int]
    votes: dict[Question, Preference]
    pairs: dict[Question, Preference]

    def as_json(self) -> dict[str, Any]:
        sides = self.key.sides
        return {
            "page": self.key.page,
            "first": sides.first,
            "second": sides.second,
            "pairs": len(sides.pairs),
            "voters": self.voters,
            "questions": {
                question: {"votes": self.votes[question].as_json(), "pairs": self.pairs[question].as_json()}
                for question in QUESTIONS
            },
        }


def tally_votes(key: Key, files: Sequence[Path]) -> Tally:
    """Count the votes of several voters.

    Raises:
        MobiusError: a file is no ballot of this page (see `read_ballot`), or two files are of the same voter.
    """
    ballots: dict[str, tuple[Path, Ballot]] = {}
    for path in files:
        ballot = read_ballot(path, key)
        voter = ballot.voter.casefold()
        if voter in ballots:
            raise MobiusError(
                f"{ballots[voter][0]} and {path} are both of the voter {ballot.voter}: give only the last one. If they"
                ' are two persons, change one "voter"'
            )
        ballots[voter] = path, ballot
    left = {pair.pair: pair.left for pair in key.sides.pairs}
    right = {pair: "second" if model == "first" else "first" for pair, model in left.items()}
    votes, pairs = {}, {}
    for question in QUESTIONS:
        preferred: dict[str, Counter[str]] = {}
        for _, ballot in ballots.values():
            for vote in ballot.votes:
                answer = vote.answers[question]
                model = {"left": left[vote.pair], "right": right[vote.pair], NO_DIFFERENCE: NO_DIFFERENCE}[answer]
                preferred.setdefault(vote.pair, Counter())[model] += 1
        votes[question] = _preference(sum(preferred.values(), Counter()))
        pairs[question] = _preference(Counter(_majority(counts) for counts in preferred.values()))
    return Tally(key, {ballot.voter: len(ballot.votes) for _, ballot in ballots.values()}, votes, pairs)


def _majority(counts: Counter[str]) -> str:
    difference = counts["first"] - counts["second"]
    return "first" if difference > 0 else "second" if difference < 0 else NO_DIFFERENCE


def _preference(counts: Counter[str]) -> Preference:
    return Preference(counts["first"], counts["second"], counts[NO_DIFFERENCE])
