"""How questions about scenes are put into words: several phrasings for each form of each question type.

Slots: {a} and {b} one object each ("the red circle"; "a red circle" where it may be missing), {g} and {h} groups ("red
circles"), {w} an area ("in the left half"), {r} a relation ("left of"), {k} an attribute ("color").
"""

import random
import re

PHRASINGS: dict[str, tuple[str, ...]] = {
    "color": (
        "What color is {a}?",
        "What is the color of {a}?",
        "What's the color of {a}?",
        "Which color does {a} have?",
        "Which color is {a}?",
        "Name the color of {a}.",
        "Tell me the color of {a}.",
        "Color of {a}?",
        "In which color is {a} drawn?",
    ),
    "shape": (
        "What shape is {a}?",
        "What is the shape of {a}?",
        "What's the shape of {a}?",
        "Which shape does {a} have?",
        "Which shape is {a}?",
        "Name the shape of {a}.",
        "Tell me the shape of {a}.",
        "Shape of {a}?",
        "What kind of shape is {a}?",
    ),
    "size": (
        "What size is {a}?",
        "What is the size of {a}?",
        "What's the size of {a}?",
        "Which size does {a} have?",
        "How big is {a}?",
        "How large is {a}?",
        "Name the size of {a}.",
        "Tell me the size of {a}.",
        "Size of {a}?",
    ),
    "position": (
        "Where is {a}?",
        "Where in the image is {a}?",
        "Where can {a} be found?",
        "What is the position of {a}?",
        "In which part of the image is {a}?",
        "Which part of the image shows {a}?",
        "Name the position of {a}.",
        "Tell me where {a} is.",
        "Position of {a}?",
    ),
    "position_area": (
        "Is {a} {w}?",
        "Is {a} found {w}?",
        "Can {a} be found {w}?",
        "Does {a} lie {w}?",
        "Is {a} located {w}?",
        "Is it true that {a} is {w}?",
        "Say whether {a} is {w}.",
        "Tell me if {a} is {w}.",
    ),
    "position_horizontal": (
        "Is {a} in the left half or in the right half?",
        "Is {a} in the left or right half of the image?",
        "In which half of the image is {a}, left or right?",
        "Does {a} lie in the left or in the right half?",
        "On which side of the image is {a}, left or right?",
        "Left or right half: where is {a}?",
        "Say whether {a} is in the left or right half.",
        "Tell me if {a} lies in the left or in the right half.",
    ),
    "position_vertical": (
        "Is {a} in the top half or in the bottom half?",
        "Is {a} in the top or bottom half of the image?",
        "In which half of the image is {a}, top or bottom?",
        "Does {a} lie in the top or in the bottom half?",
        "Is {a} near the top or near the bottom of the image?",
        "Top or bottom half: where is {a}?",
        "Say whether {a} is in the top or bottom half.",
        "Tell me if {a} lies in the top or in the bottom half.",
    ),
    "count": (
        "How many {g} are there?",
        "How many {g} do you see?",
        "How many {g} are in the image?",
        "How many {g} can you find?",
        "How many {g} does the image show?",
        "What is the number of {g}?",
        "Count the {g}.",
        "Give the number of {g}.",
        "Number of {g}?",
    ),
    "count_area": (
        "How many {g} are {w}?",
        "How many {g} are there {w}?",
        "How many {g} do you see {w}?",
        "How many {g} can you find {w}?",
        "{w}, how many {g} are there?",
        "What is the number of {g} {w}?",
        "Count the {g} {w}.",
        "Give the number of {g} {w}.",
        "Number of {g} {w}?",
    ),
    "existence": (
        "Is there {a}?",
        "Is there {a} in the image?",
        "Do you see {a}?",
        "Can you see {a} in the image?",
        "Does the image show {a}?",
        "Does the image contain {a}?",
        "Can you find {a}?",
        "Are there any {g}?",
        "Do you see any {g}?",
        "Say whether there is {a}.",
        "Tell me if the image shows any {g}.",
    ),
    "existence_area": (
        "Is there {a} {w}?",
        "Do you see {a} {w}?",
        "Can you see {a} {w}?",
        "Does the image show {a} {w}?",
        "{w}, is there {a}?",
        "Are there any {g} {w}?",
        "Do you see any {g} {w}?",
        "Say whether there is {a} {w}.",
        "Tell me if there are any {g} {w}.",
    ),
    "relation": (
        "Is {a} {r} {b}?",
        "Do you see {a} {r} {b}?",
        "Is it true that {a} is {r} {b}?",
        "Can {a} be found {r} {b}?",
        "Does {a} lie {r} {b}?",
        "Is {a} located {r} {b}?",
        "Say whether {a} is {r} {b}.",
        "Tell me if {a} is {r} {b}.",
    ),
    "relation_horizontal": (
        "Is {a} to the left or to the right of {b}?",
        "Is {a} left or right of {b}?",
        "Seen from {b}, is {a} left or right?",
        "On which side of {b} is {a}, left or right?",
        "Does {a} lie left or right of {b}?",
        "Where is {a}, left or right of {b}?",
        "Say whether {a} is left or right of {b}.",
        "Left or right of {b}: where is {a}?",
    ),
    "relation_vertical": (
        "Is {a} above or below {b}?",
        "Seen from {b}, is {a} above or below?",
        "Does {a} lie above or below {b}?",
        "Where is {a}, above or below {b}?",
        "Is {a} located above or below {b}?",
        "Do you find {a} above or below {b}?",
        "Say whether {a} is above or below {b}.",
        "Above or below {b}: where is {a}?",
    ),
    "comparison_same": (
        "Do {a} and {b} have the same {k}?",
        "Is the {k} of {a} the same as that of {b}?",
        "Are {a} and {b} equal in {k}?",
        "Does {a} have the same {k} as {b}?",
        "Do {a} and {b} share the same {k}?",
        "Is {a} of the same {k} as {b}?",
        "Say whether {a} and {b} have the same {k}.",
        "Same {k}: {a} and {b}?",
    ),
    "comparison_all_same": (
        "Do all {g} have the same {k}?",
        "Are all {g} of the same {k}?",
        "Are all {g} equal in {k}?",
        "Do the {g} all share one {k}?",
        "Is the {k} of all {g} the same?",
        "Is it true that all {g} have the same {k}?",
        "Say whether all {g} have the same {k}.",
        "Same {k} for all {g}?",
    ),
    "comparison_larger": (
        "Is {a} bigger than {b}?",
        "Is {a} larger than {b}?",
        "Is {b} smaller than {a}?",
        "Does {a} have a larger size than {b}?",
        "Is the size of {a} greater than that of {b}?",
        "Is it true that {a} is larger than {b}?",
        "Say whether {a} is bigger than {b}.",
        "Tell me if {b} is smaller than {a}.",
    ),
    "comparison_which_larger": (
        "Which is bigger, {a} or {b}?",
        "Which is larger, {a} or {b}?",
        "Which one is bigger: {a} or {b}?",
        "Which object is larger, {a} or {b}?",
        "Of {a} and {b}, which is larger?",
        "Of {a} and {b}, which one is bigger?",
        "Name the larger one: {a} or {b}.",
        "Bigger: {a} or {b}?",
    ),
    "comparison_more": (
        "Are there more {g} than {h}?",
        "Do you see more {g} than {h}?",
        "Is the number of {g} larger than that of {h}?",
        "Does the image show more {g} than {h}?",
        "Are there fewer {h} than {g}?",
        "Do you see fewer {h} than {g}?",
        "Is the number of {h} smaller than that of {g}?",
        "Say whether there are more {g} than {h}.",
    ),
    "comparison_equal": (
        "Is the number of {g} equal to the number of {h}?",
        "Is the number of {g} the same as that of {h}?",
        "Are there just as many {g} as {h}?",
        "Are there equally many {g} and {h}?",
        "Do you see the same number of {g} and {h}?",
        "Does the image show the same number of {g} and {h}?",
        "Is it true that there are exactly as many {g} as {h}?",
        "Say whether there are equally many {g} and {h}.",
    ),
    "comparison_which_more": (
        "What are there more of, {g} or {h}?",
        "Which are there more of, {g} or {h}?",
        "What do you see more of, {g} or {h}?",
        "Which are more numerous, {g} or {h}?",
        "Of {g} and {h}, which are there more of?",
        "Does the image show more {g} or more {h}?",
        "Are there more {g} or more {h}?",
        "Name what there is more of: {g} or {h}.",
    ),
    "description": (
        "Describe the image.",
        "Describe the image in detail.",
        "Describe what you see.",
        "What do you see?",
        "What is in the image?",
        "What does the image show?",
        "Give a description of the image.",
        "List all objects with their sizes and positions.",
    ),
    "description_short": (
        "Describe the image briefly.",
        "Describe the image in a few words.",
        "Give a short description of the image.",
        "Give a brief description of the image.",
        "Briefly, what do you see?",
        "In short, what is in the image?",
        "List the objects by color and shape.",
        "Name the objects in the image.",
    ),
}
"""By form; the type of a question is the form up to its first underscore."""

_BRITISH_SHARE = 0.2  # of the questions, write "colour"
_CASUAL_SHARE = 0.1  # are typed in haste: no capital letter, no question mark, half of them "circle" for "the circle"


def phrase(rng: random.Random, form: str, **parts: str) -> str:
    """Put a question into words.

    Args:
        rng: decides phrasing and spelling.
        form: one of PHRASINGS.
        parts: what the slots of the form stand for.
    """
    template = rng.choice(PHRASINGS[form])
    is_casual = rng.random() < _CASUAL_SHARE
    if is_casual and rng.random() < 0.5:
        parts = {slot: re.sub("^(the|an?) ", "", text) for slot, text in parts.items()}
    question = template.format(**parts)
    if rng.random() < _BRITISH_SHARE:
        question = re.sub(r"\b([Cc])olor\b", r"\1olour", question)
    return question.rstrip("?.").lower() if is_casual else question[0].upper() + question[1:]
