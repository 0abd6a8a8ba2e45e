"""What a file is, told by its first bytes: for messages about files that are something else."""

import codecs

HEAD = 512  # bytes that decide
UNKNOWN = "of an unknown kind"
ADVICE = {  # what a file is -> what to do, where that is the same for every use
    "an HTML page": "it is what a server sent in place of the file: download the file itself",
    "a Git LFS pointer": "fetch the file itself with git lfs pull",
}
MAGIC = {
    b"\x93NUMPY": "a .npy array",
    b"PK": "a ZIP archive",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"BM": "a BMP image",
    b"RIFF": "a WebP image or another RIFF file",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
    b"\x80": "a pickle, which is never run",
    b"version https://git-lfs": "a Git LFS pointer",
}


def sniff(data: bytes) -> str:
    """Say what a file is that begins with data, such as "an HTML page"."""
    for magic, kind in MAGIC.items():
        if data.startswith(magic):
            return kind
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data[:HEAD]).strip("\ufeff\n\r\t ")
    except UnicodeDecodeError:
        return UNKNOWN
    if text.lower().startswith(("<!doctype html", "<html")):
        return "an HTML page"
    if any(ord(c) < 32 for c in text if c not in "\n\r\t"):
        return UNKNOWN
    return "a text file" if text else "empty"


def explain(data: bytes, need: str) -> str:
    """Say what a file is that begins with data, and what to do; need: what to give instead."""
    kind = sniff(data)
    return f"it is {kind}: {ADVICE.get(kind, need)}"
