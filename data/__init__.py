"""Where rows come from, and what a teacher and a student are shown."""

from data.formats import FORMATS, ReasoningFormat, load_format

__all__ = ["FORMATS", "ReasoningFormat", "load_format"]
