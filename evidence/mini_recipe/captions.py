"""Turn file names, icon names and emoji records into short lower-case names and categories."""

import re


def _words(text: str) -> set[str]:
    """Return the set of words in a text."""
    return set(text.split())


# Prefixes of emoji sub-categories, and plain words for them. The first prefix that matches is used.
EMOJI_CATEGORIES = (
    ("face-", ("face",)),
    ("cat-face", ("animal", "face", "cat")),
    ("monkey-face", ("animal", "face", "monkey")),
    ("emotion", ("symbol",)),
    ("heart", ("heart", "symbol")),
    ("person", ("person",)),
    ("family", ("person", "family")),
    ("hand", ("hand",)),
    ("body", ("body part",)),
    ("animal-mammal", ("animal", "mammal")),
    ("animal-bird", ("animal", "bird")),
    ("animal-marine", ("animal", "sea animal")),
    ("animal-bug", ("animal", "insect")),
    ("animal", ("animal", "reptile")),
    ("plant-flower", ("plant", "flower")),
    ("plant", ("plant",)),
    ("food-fruit", ("food", "fruit")),
    ("food-vegetable", ("food", "vegetable")),
    ("food-sweet", ("food", "dessert")),
    ("food", ("food",)),
    ("drink", ("food", "drink")),
    ("transport-ground", ("vehicle",)),
    ("transport-air", ("vehicle", "aircraft")),
    ("transport-water", ("vehicle", "ship")),
    ("transport-sign", ("sign",)),
    ("place-building", ("building",)),
    ("place-religious", ("building", "religion")),
    ("place-map", ("map",)),
    ("place", ("place",)),
    ("sky", ("weather",)),
    ("time", ("clock", "time")),
    ("clothing", ("object", "clothing", "clothes")),
    ("tool", ("object", "tool")),
    ("computer", ("object", "computer")),
    ("phone", ("object", "telephone")),
    ("musical", ("object", "musical instrument", "music")),
    ("sport", ("sport",)),
    ("game", ("game",)),
    ("arrow", ("arrow", "symbol")),
    ("zodiac", ("symbol", "zodiac")),
    ("alphanum", ("symbol",)),
)
OBJECTS = _words(
    "sound music light book-paper money mail writing office lock science medical household other-object dishware"
)

# Folder names (Debian openclipart, icon sets) and plain words for them. Other names are cleaned and kept.
FOLDERS = {
    "people": "person",
    "recreation": "recreation",
    "sports": "sport",
    "geography": "map",
    "map symbols": "map",
    "homes": "house",
    "bugs": "insect",
    "fish": "fish",
    "sport": "sport",
    "bodypart": "body part",
    "clothing": "clothes",
    "beverages": "drink",
    "smilies": "face",
    "stickmen": "stick figure",
    "transportation": "vehicle",
    "transport": "vehicle",
    "vehicles": "vehicle",
    "automotive": "vehicle",
    "foods": "food",
    "food drink": "food",
    "food drinks": "food",
    "hardware tools": "tool",
    "emoji": "face",
    "emotions": "face",
    "peoples": "person",
    "users": "person",
    "users people": "person",
    "cd player": "music",
}
SKIPPED_FOLDERS = _words(
    """
    unsorted icons action actions apps applications mimetypes filesystems stock generic emblems devices
    device base others objects symbols content design edit abstract components operate brand logos build
    industry character
    """
) | {"flat theme", "lemon theme", "etiquette theme", "bordered", "white", "simple", "ornamental", "life"}
PLAIN_PLURALS = {"clothes", "glass", "chess", "christmas", "bus", "cactus", "dress", "bass", "glasses", "scissors"}

# Words that only say how an icon is drawn, and words for a second icon that is combined with the first.
STYLE_WORDS = _words(
    """
    outline outlined filled fill duo flat negative alt variant thin bold sharp rounded px color icon
    """
)
GLUED_WORDS = _words(
    """
    off plus minus cancel check remove alert lock edit cog sync pause add search delete disabled settings
    play stop question dollar pin star up down share code heart exclamation refresh unlock view download
    upload
    """
)
SKIN_TONES = re.compile(r"(?:-medium)?-(?:light|dark|medium)$|skin-tone")


def squash(name: str) -> str:
    """Reduce a name to lower-case letters and digits, so that names from different sets can be compared."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def singular(word: str) -> str:
    """Return the singular of a regular English plural: "dog" for "dogs", "berry" for "berries"."""
    if word in PLAIN_PLURALS or len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("shes", "ches", "xes")):
        return word[:-2]
    return word[:-1]


def clean_title(name: str, dictionary: set[str]) -> str:
    """Turn a file or icon name into words: no digits, no single letters, only words of the dictionary.

    Args:
        name: for example "virus_andreas_nilsson_01".
        dictionary: lower-case words, without the names of authors.

    Returns:
        For example "virus"; empty if nothing is left.
    """
    words = re.split(r"[^a-z]+", name.lower())
    return " ".join(word for word in words if len(word) > 1 and word in dictionary)


def clean_icon_name(name: str, dictionary: set[str]) -> str:
    """Turn an icon's name into words; return "" for icons to leave out (a brand, two icons in one, a flag)."""
    words = [word for word in re.split(r"[^a-z]+", name.lower()) if len(word) > 1 and word not in STYLE_WORDS]
    glued = len(words) > 1 and GLUED_WORDS & set(words[1:])
    if not words or len(words) > 4 or glued or not dictionary.issuperset(words):
        return ""
    return "" if {"brand", "logo", "alpha", "numeric", "letter", "flag", "flags"} & set(words) else " ".join(words)


def emoji_categories(subcategory: str) -> tuple[str, ...]:
    """Return plain words for an emoji sub-category: ("food", "fruit") for "food-fruit"."""
    if subcategory in OBJECTS or subcategory.startswith("light"):
        return ("object",)
    return next((words for start, words in EMOJI_CATEGORIES if subcategory.startswith(start)), ())


def folder_categories(folders: list[str]) -> tuple[str, ...]:
    """Return plain words for folder names: ("animal", "mammal") for ["animals", "mammals"]."""
    words = []
    for folder in folders:
        spaced = re.sub(r"[_-]|(?<=[a-z])(?=[A-Z])", " ", folder).lower()
        for part in re.split(r"\band\b|/|&", spaced):
            part = part.strip()
            if part and part not in SKIPPED_FOLDERS:
                words.append(FOLDERS.get(part) or " ".join(singular(word) for word in part.split()))
    return tuple(dict.fromkeys(words))


def is_flag(name: str) -> bool:
    """Return whether a name or path mentions flags, which are kept out of pre-training."""
    return "flag" in squash(name)


class HeldOut:
    """The concepts kept out of pre-training: those shown in the `emoji` and `clipart` tasks.

    Args:
        concepts: names in any spelling; they are compared in the singular and after ``squash``.
    """

    def __init__(self, concepts: list[str]) -> None:
        self._keys = {self._key(concept) for concept in concepts}

    @staticmethod
    def _key(name: str) -> str:
        return squash(" ".join(singular(word) for word in re.split(r"[^a-z0-9]+", name.lower())))

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self._keys
