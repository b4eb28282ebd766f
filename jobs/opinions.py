"""What invented users think of movies: their scores, and comments that fit these scores. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from repository.accounts.invented_users import INVENTED_USERS
from repository.catalog.generated import Comment
from resources.ratings import HIGHEST_SCORE, LOWEST_SCORE

MOST_OF_MOVIE = 12  # as many opinions on a new movie as it can have ratings
# How far the scores of a movie lie apart, as a standard deviation.
SPREAD = 1.6
MEAN_SCORE = 6.5  # of a movie that the user who listed it has not rated
LIKED, DISLIKED = 8, 4  # The lowest score of a movie that a user likes, and the highest of one that a user dislikes.
REPLIES = 0.4  # the share of comments that reply to an earlier one, if there is one

PRAISE = (
    "One of the best films I have seen this year.", "I went in without expectations and stayed for the credits.",
    "Beautiful from the first shot to the last.", "I have already watched it twice.",
    "This is why I go to the cinema.", "Funny, sad and never sentimental.",
)  # fmt: skip
MIXED = (
    "A good idea that needed another draft.", "The first half is wonderful; the second one less so.",
    "Worth seeing once.", "I wanted to like it more than I did.", "Solid work, but nothing that stays with you.",
    "Better than the reviews said, not as good as the trailer.",
)  # fmt: skip
COMPLAINTS = (
    "Two hours that I will not get back.", "I could tell the ending after ten minutes.",
    "So much talent, and so little to do for it.", "I fell asleep, and I was not even tired.",
    "Nobody in this film talks like a real person.", "The poster was the best part.",
)  # fmt: skip
DETAILS = (
    "The score is by someone to remember.", "The camera does most of the acting.", "Watch it on a large screen.",
    "The scene at the station is the heart of it.", "The supporting cast carries it.",
    "It is a little too long.", "The dialogue is sharp.", "The last ten minutes change everything.",
)  # fmt: skip
ANSWERS = (
    "I see it the same way.", "I saw another film, it seems.", "Give it a second chance.", "That is well put.",
    "What did you think of the ending?", "You should see the director's earlier work.", "Thank you, now I am curious.",
    "I disagree, but you have a point.",
)  # fmt: skip


def score(random: Random, movie: Mapping[str, Any]) -> int:
    """Return the score of a user for a movie: near the rating by the user who listed it, which is from 0 to 100."""
    mean = movie["rating"] / 10 if movie["rating"] is not None else MEAN_SCORE
    return max(LOWEST_SCORE, min(HIGHEST_SCORE, round(random.gauss(mean, SPREAD))))


def ratings(random: Random, movie: Mapping[str, Any], count: int) -> list[tuple[int, int]]:
    """Return `count` different invented users, each with a score for the movie."""
    return [(user, score(random, movie)) for user in random.sample(range(INVENTED_USERS), count)]


def comments(random: Random, raters: Sequence[tuple[int, int]], count: int) -> list[Comment]:
    """Return `count` comments by the users who have these scores for a movie, in the order in which they were written.

    There must be at least one user.
    """
    made: list[Comment] = []
    for position in range(count):
        author, given = raters[position % len(raters)]
        replies_to = random.randrange(position) if position and random.random() < REPLIES else None
        if replies_to is not None:
            text = random.choice(ANSWERS)
        else:
            moods = PRAISE if given >= LIKED else COMPLAINTS if given <= DISLIKED else MIXED
            text = f"{random.choice(moods)} {random.choice(DETAILS)}"
        made.append(Comment(author, text, replies_to))
    return made
