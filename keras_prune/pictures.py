"""Image files as arrays of one size, and the labels that come with them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")


def files_in(folder: Path) -> list[Path]:
    """All image files in a folder and its sub-folders, sorted.

    Raises:
        ValueError: there are none.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file() and p.name[0] != ".")
    if not files:
        raise ValueError(f"{folder} holds no images; looked for {', '.join(ENDINGS)}, in sub-folders too.")
    return files


def labels_of(files: list[Path], folder: Path, labels) -> tuple[np.ndarray, tuple[str, ...]]:
    """One class number for each file, and the classes where they have names.

    Args:
        labels: "folders", a .csv file of file,label, a .npy file or an array with one number for each file, in the
            order of `files`.

    Returns:
        numbers, shape (files,), and notes.

    Raises:
        ValueError: a file without a label, and which.
    """
    relative = [p.relative_to(folder) for p in files]
    if str(labels) == "folders":
        outside = [str(p) for p in relative if len(p.parts) < 2]
        if outside:
            raise ValueError(f'labels="folders" needs each image in a sub-folder of {folder}; {outside[0]} is in none.')
        words = [p.parts[0] for p in relative]
    elif isinstance(labels, (str, Path)) and Path(labels).suffix == ".csv" and Path(labels).is_file():
        words = _of_table(relative, Path(labels))
    elif not isinstance(labels, (str, Path)) or (Path(labels).suffix == ".npy" and Path(labels).is_file()):
        numbers = np.load(labels, allow_pickle=False) if isinstance(labels, (str, Path)) else np.asarray(labels)
        words = [str(n) for n in numbers.reshape(-1)]
        if len(words) != len(files):
            raise ValueError(f"labels holds {len(words)} numbers for {len(files)} images in {folder}.")
    else:
        raise ValueError(f'labels={labels!r} was passed; expected "folders", a .csv file of file,label or a .npy file.')
    if str(labels) != "folders" and all(word.lstrip("-").isdigit() for word in words):
        return np.array([int(word) for word in words]), ()
    classes = sorted(set(words))
    note = f"classes 0 to {len(classes) - 1}: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}"
    return np.array([classes.index(word) for word in words]), (note,)


def _of_table(relative: list[Path], path: Path) -> list[str]:
    with path.open(newline="", encoding="utf8") as file:
        rows = [[cell.strip() for cell in row[:2]] for row in csv.reader(file) if row]
    if any(len(row) < 2 for row in rows):
        raise ValueError(f"{path}: expected lines of file,label.")
    table = {Path(name).as_posix(): label for name, label in rows}
    names = [p.name for p in relative]  # alone they do where no two files share one
    words = [table.get(p.as_posix(), table.get(p.name) if names.count(p.name) == 1 else None) for p in relative]
    missing = [str(p) for p, word in zip(relative, words) if word is None]
    if missing:
        raise ValueError(f"{path} holds no label for {len(missing)} of {len(relative)} images, such as {missing[0]}.")
    return words


def opened(path: Path):
    """A decoded PIL image; whatever the decoder of its format raises comes through."""
    from PIL import Image

    with Image.open(path) as image:
        if image.mode[0] in "IF":  # PIL would clip 16 bits to 8
            raise ValueError(f"{image.mode} pixels, expected 8 bits")
        image.load()
        return image.convert("RGB") if image.mode in ("P", "PA") else image.copy()


def as_picture(image: np.ndarray):
    """A PIL image from uint8 (height, width, 1 or 3)."""
    from PIL import Image

    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def fitted(image, shape: tuple) -> np.ndarray:
    """uint8 (height, width, channels): the shorter side resized, then the middle cut out.

    Args:
        shape: (height, width, channels); None for the image's own size.
    """
    from PIL import Image

    height, width, channels = shape
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = height or image.height, width or image.width
    if (image.height, image.width) != (height, width):
        scale = max(height / image.height, width / image.width)
        size = max(width, round(image.width * scale)), max(height, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - width) // 2, (size[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image).reshape(height, width, channels)
