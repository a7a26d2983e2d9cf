"""The text and the tokenizer of the bundled decoder.

The text comes from the Debian package ``sword-text-web``: a Bible translation in plain modern English that its authors
have dedicated to the public domain. A SWORD ``zText`` module holds three files per testament: ``.bzz`` (zlib-compressed
books, marked up in OSIS XML), ``.bzs`` (where each book lies) and ``.bzv`` (where each verse lies in its book).
"""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGE = "sword-text-web"
MODULE = Path("usr/share/sword/modules/texts/ztext/engWEB2015eb")
# Of all chapters, joined by blank lines: tells whether another release of the package has another text.
TEXT_SHA256 = "7733c0fb3bb16ba3598f52e40d2ae5de718fc2383c3824357f9dbd72228ee14a"

END_OF_TEXT = "<|endoftext|>"
VALIDATION_PERIOD = 80
"""Every 80th chapter is held out: 1.25 % of the text, from all over it."""

_BOOK_RECORD = struct.Struct("<III")  # offset, compressed size, size
_VERSE_RECORD = struct.Struct("<IIH")  # book, offset in the book, size
_LEFT_OUT = re.compile(r"<(note|title|speaker)\b[^>]*?(?:/>|>.*?</\1>)", re.DOTALL)
_CHAPTER_START = re.compile(r"<chapter\b[^>]*\bsID=[^>]*>")
_PARAGRAPH_START = re.compile(r"<(?:div|lb)\b[^>]*type=\"x-p\"[^>]*>|<lg\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")
# Text to type at a prompt: straight quotation marks, and a dash that stands apart.
_PLAIN_CHARACTERS = {
    0x201C: '"',
    0x201D: '"',
    0x2018: "'",
    0x2019: "'",
    0x2014: " - ",
    0x2013: "-",
    0xA0: " ",
    0x202F: " ",
}


def download_package(folder: Path) -> Path:
    """Fetch the Debian package into ``folder`` with apt and return its path."""
    subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
    return next(folder.glob(f"{PACKAGE}_*.deb"))


def read_chapters(package: Path | None = None) -> list[str]:
    """The chapters in the package's order, one paragraph per line. Without ``package`` it is downloaded first."""
    with tempfile.TemporaryDirectory() as folder:
        archive = package or download_package(Path(folder))
        subprocess.run(["dpkg-deb", "-x", str(archive), folder], check=True)
        books = [book for testament in ("ot", "nt") for book in _read_books(Path(folder) / MODULE, testament)]
    chapters = [chapter for book in books for chapter in _split_chapters(book)]
    if hashlib.sha256("\n\n".join(chapters).encode()).hexdigest() != TEXT_SHA256:
        print(f"warning: {PACKAGE} has another text here than the bundled model was trained on", file=sys.stderr)
    return chapters


def split_validation(chapters: list[str]) -> tuple[list[str], list[str]]:
    """(training chapters, held-out chapters)."""
    held_out = chapters[VALIDATION_PERIOD - 1 :: VALIDATION_PERIOD]
    training = [chapter for index, chapter in enumerate(chapters) if (index + 1) % VALIDATION_PERIOD]
    return training, held_out


def train_tokenizer(chapters: list[str], vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer: every string has an encoding that decodes to itself. Token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    return tokenizer


def _read_books(module: Path, testament: str) -> Iterator[str]:
    """Marked-up books, their verses apart by one space. The index names verses that share their text several times."""
    compressed = (module / f"{testament}.bzz").read_bytes()
    books = [
        zlib.decompress(compressed[offset : offset + size])
        for offset, size, _ in _BOOK_RECORD.iter_unpack((module / f"{testament}.bzs").read_bytes())
    ]
    verses: list[dict[int, str]] = [{} for _ in books]
    for book, offset, size in _VERSE_RECORD.iter_unpack((module / f"{testament}.bzv").read_bytes()):
        if size:
            verses[book].setdefault(offset, "")
            whole = books[book][offset : offset + size].decode()
            verses[book][offset] = max(verses[book][offset], whole, key=len)
    for book in verses:
        yield " ".join(text for _, text in sorted(book.items()))


def _split_chapters(book: str) -> Iterator[str]:
    """The chapters of a marked-up book without notes, headings, and what stands before the first chapter."""
    for marked_up in _CHAPTER_START.split(_LEFT_OUT.sub(" ", book))[1:]:
        text = _TAG.sub("", _PARAGRAPH_START.sub("\n", marked_up))
        text = re.sub(r"”(?=\w)", "” ", text).translate(_PLAIN_CHARACTERS)
        text = re.sub(r" +([,.;:?!)])", r"\1", re.sub(r"[ \t]+", " ", text))
        paragraphs = [paragraph.strip() for paragraph in text.splitlines() if paragraph.strip()]
        if paragraphs:
            yield "\n".join(paragraphs)
