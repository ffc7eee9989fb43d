"""The pre-training pairs: 64x64 pictures, each with its names and categories."""

import dataclasses
import json
import re
import string
from pathlib import Path

import numpy as np

from evidence.mini_recipe import captions, drawing, measure, sources, tasks
from evidence.mini_recipe.measure import TASKS

NEAR_TASK_IMAGE = 8.0  # grey levels between thumbnails; a nearer picture counts as a repeat of a task's picture
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIGNS = {
    "+": "plus sign", "-": "minus sign", "=": "equals sign", "?": "question mark", "!": "exclamation mark",
    "#": "number sign", "%": "percent sign", "&": "ampersand", "*": "asterisk", "@": "at sign", "$": "dollar sign",
    "€": "euro sign", "£": "pound sign", "←": "left arrow", "→": "right arrow", "↑": "up arrow", "↓": "down arrow",
    "♥": "heart", "♦": "diamond", "♣": "club", "♠": "spade", "★": "star", "●": "circle", "■": "square",
    "▲": "triangle", "♪": "musical note", "☼": "sun", "✓": "check mark",
}  # fmt: skip


@dataclasses.dataclass
class Pair:
    """A picture and its words.

    Attributes:
        source: the package that it comes from.
        kind: "emoji", "clipart", "icon" (coloured), "outline" (one ink) or "glyph".
        names: what it shows, most exact name first.
        categories: what kind of thing it shows.
        image: RGBA, uint8, (64, 64, 4).
    """

    source: str
    kind: str
    names: tuple[str, ...]
    categories: tuple[str, ...]
    image: np.ndarray


def emoji_names(record: dict) -> tuple[str, ...]:
    """Return the names of an entry of emoji-datasource, most exact first: ("grinning face", "grinning")."""
    names = [record["name"] or ""] + record["short_names"]
    cleaned = [re.sub(r"[_-]+", " ", name).lower().strip() for name in names]
    return tuple(dict.fromkeys(name for name in cleaned if re.search("[a-z]", name)))


def emoji_pairs(work: sources.Folder, held_out: captions.HeldOut) -> list[Pair]:
    """Return two vendors' drawings of every emoji, without flags and held-out concepts.

    The list of emoji has no variants with skin tones.
    """
    pairs = []
    for vendor in ("twitter", "google"):
        folder = work.npm(f"emoji-datasource-{vendor}")
        for record in json.loads((folder / "emoji.json").read_text(encoding="utf-8")):
            names = emoji_names(record)
            if record["category"] in ("Flags", "Component") or any(name in held_out for name in names):
                continue
            image = drawing.read_square(folder / "img" / vendor / "64" / record["image"])
            if image is not None:
                categories = captions.emoji_categories(record["subcategory"])
                pairs.append(Pair(f"emoji-datasource-{vendor}", "emoji", names, categories, image))
    return pairs


def known_emoji(work: sources.Folder) -> dict[str, tuple]:
    """Return the names and categories of every emoji but flags, keyed by each of its names after ``squash``.

    The names include the one in CLDR.
    """
    records = json.loads((work.npm("emoji-datasource-twitter") / "emoji.json").read_text(encoding="utf-8"))
    cldr = json.loads((work.npm("@iconify-json/fluent-emoji-flat") / "chars.json").read_text(encoding="utf-8"))
    cldr = {code.replace("-fe0f", ""): name for code, name in cldr.items()}
    known: dict[str, tuple] = {}
    for record in records:
        if record["category"] in ("Flags", "Component"):
            continue
        names = emoji_names(record)
        other = cldr.get(record["unified"].lower().replace("-fe0f", ""), "").replace("-", " ")
        if other and other not in names:
            names = (*names, other)
        for name in names:
            known.setdefault(captions.squash(name), (names, captions.emoji_categories(record["subcategory"])))
    return known


def clipart_pairs(work: sources.Folder, held_out: captions.HeldOut, dictionary: set[str]) -> list[Pair]:
    """Return the clip art of openclipart, with names from file names and categories from folder names.

    Flags and held-out titles and paths are left out.
    """
    root = work.deb("openclipart-png") / "usr/share/openclipart/png"
    pairs = []
    for path in sorted(root.rglob("*.png")):
        place = path.relative_to(root)
        title = captions.clean_title(path.stem, dictionary)
        if captions.is_flag(str(place)) or title in held_out or str(place) in held_out:
            continue
        categories = captions.folder_categories(list(place.parts[:-1]))
        names = (title,) if title else ()
        image = drawing.read_square(path) if names or categories else None
        if image is not None:
            pairs.append(Pair("openclipart-png", "clipart", names, categories, image))
    return pairs


def icon_pairs(
    work: sources.Folder, held_out: captions.HeldOut, dictionary: set[str], known: dict[str, tuple]
) -> list[Pair]:
    """Return the icons of the icon sets, rendered from SVG.

    Args:
        known: names and categories of emoji by squashed name. Emoji sets keep only the icons found here. Icons of other
            sets take the categories of the emoji with the same name, or with the last word of the name.
    """
    pairs = []
    for icon_set in sources.ICON_SETS:
        folder = work.npm(icon_set.package)
        icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        folders = _folders_by_icon(folder / "metadata.json")
        for name in icons["icons"]:
            words = _icon_words(name, icon_set.kind, dictionary, known, folders.get(name, ()))
            if words is None or any(word in held_out for word in (name, *words[0])):
                continue
            image = drawing.draw_icon(icons, name)
            if image is not None:
                pairs.append(Pair(icon_set.package, icon_set.kind, *words, image))
    return pairs


def _folders_by_icon(metadata: Path) -> dict[str, tuple[str, ...]]:
    """Return the categories of each icon, from the metadata of its set."""
    found: dict[str, tuple[str, ...]] = {}
    categories = json.loads(metadata.read_text(encoding="utf-8")).get("categories", {}) if metadata.exists() else {}
    for category, names in categories.items():
        for name in names:
            found[name] = (*found.get(name, ()), category)
    return found


def _icon_words(
    name: str, kind: str, dictionary: set[str], known: dict[str, tuple], folders: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return the names and categories of an icon, or None if it is to be left out."""
    if captions.is_flag(name) or "Flags" in folders or captions.SKIN_TONES.search(name):
        return None
    bare = re.sub(r"-\d+$", "", name)
    if kind == "emoji":
        return known.get(captions.squash(bare))
    title = captions.clean_icon_name(bare, dictionary)
    if not title:
        return None
    same = known.get(captions.squash(title)) or known.get(captions.singular(title.split()[-1]))
    kinds = () if same is None or "symbol" in same[1] else same[1]
    categories = (*kinds, *captions.folder_categories(list(folders)))
    return (title,), tuple(dict.fromkeys(categories))


def glyph_pairs(work: sources.Folder) -> list[Pair]:
    """Return digits, capital letters and signs in free fonts.

    Letters come only from fonts that the `letters` task does not use.
    """
    pairs = []
    for font in sources.FONTS:
        files = [path for path in sorted(work.deb(font.package).rglob("*")) if path.suffix.lower() in (".ttf", ".otf")]
        for path in files[: font.most]:
            characters = string.digits + "".join(SIGNS) + (string.ascii_uppercase if font.letters else "")
            for character in characters:
                image = drawing.draw_glyph(character, path)
                if image is not None:
                    pairs.append(Pair(font.package, "glyph", *_glyph_words(character), image))
    return pairs


def _glyph_words(character: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if character in string.digits:
        word = DIGITS[int(character)]
        return (f"number {word}", f"digit {word}", word, f"number {character}"), ("number", "digit")
    if character in string.ascii_uppercase:
        return (f"letter {character.lower()}", f"capital letter {character.lower()}"), ("letter", "capital letter")
    return (SIGNS[character],), ("sign",)


def without_repeats(pairs: list[Pair], task_images: np.ndarray) -> list[Pair]:
    """Drop pictures that repeat an earlier one, and those that nearly repeat a picture of a task.

    Args:
        task_images: RGB, uint8, (count, 64, 64, 3).
    """
    small = drawing.thumbnails(drawing.on_white(np.stack([pair.image for pair in pairs])))
    _, distance = drawing.nearest(small, drawing.thumbnails(task_images))
    kept, seen = [], set()
    for pair, thumbnail, gap in zip(pairs, small, distance, strict=True):
        key = (thumbnail / 4).round().astype(np.uint8).tobytes()
        near = gap < NEAR_TASK_IMAGE and pair.kind != "glyph"
        if not near and key not in seen:
            kept.append(pair)
            seen.add(key)
    return kept


def dictionary(work: sources.Folder) -> set[str]:
    """Return the English words in lower case, which leaves out names."""
    words = (work.deb("wamerican") / "usr/share/dict/american-english").read_text(encoding="utf-8").split()
    return {word for word in words if word.islower()}


def held_out_concepts(work: sources.Folder) -> captions.HeldOut:
    """Return all names of the emoji, and all titles and paths of the clip art, that `held_out.json` lists."""
    codes = {entry.split("/")[1] for _, _, entry in tasks.listed("emoji")}
    paths = [entry for _, _, entry in tasks.listed("clipart")]
    records = json.loads((work.npm("emoji-datasource-twitter") / "emoji.json").read_text(encoding="utf-8"))
    names = [name for record in records if record["image"][:-4] in codes for name in emoji_names(record)]
    words = dictionary(work)
    titles = [title for path in paths if (title := captions.clean_title(Path(path).stem, words))]
    return captions.HeldOut([*names, *paths, *titles])


def build(work: sources.Folder) -> list[Pair]:
    """Return all pairs in a fixed order, without pictures of the shipped tasks and without held-out concepts."""
    held_out, words = held_out_concepts(work), dictionary(work)
    pairs = emoji_pairs(work, held_out)
    pairs += icon_pairs(work, held_out, words, known_emoji(work))
    pairs += glyph_pairs(work) + clipart_pairs(work, held_out, words)
    archives = [TASKS / f"{name}.zip" for name in ("emoji", "clipart", "flags")]
    images = [np.asarray(image) for archive in archives for _, image in measure.task_images(archive)]
    return without_repeats(pairs, np.stack(images))


def save(pairs: list[Pair], path: Path) -> None:
    """Write pictures and words to one `.npz` file."""
    words = json.dumps([(pair.source, pair.kind, pair.names, pair.categories) for pair in pairs])
    np.savez(path, images=np.stack([pair.image for pair in pairs]), words=words)


def load(path: Path) -> list[Pair]:
    """Read what `save` wrote."""
    with np.load(path) as stored:
        images, words = stored["images"], json.loads(str(stored["words"]))
    return [
        Pair(source, kind, tuple(names), tuple(categories), image)
        for (source, kind, names, categories), image in zip(words, images, strict=True)
    ]
