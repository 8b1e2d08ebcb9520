"""Glob patterns on module names."""

from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern fits a dotted name, or its end: `attn.c_attn` fits `transformer.h.0.attn.c_attn`."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
