"""Data: from files, the Hub or the standard library to rows, and from rows to batches of tensors."""

from lrcompress.data.examples import Examples, Sentences, Windows, sentences, token_stream, windows
from lrcompress.data.rows import Data, DataSource, Kind, Media, Rows, fingerprint, read_rows

__all__ = [
    "Data", "DataSource", "Examples", "Kind", "Media", "Rows", "Sentences", "Windows", "fingerprint", "read_rows",
    "sentences", "token_stream", "windows",
]  # fmt: skip
