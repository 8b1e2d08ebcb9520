"""The report as it can be given away: without the places on the machine that made it."""

from pydantic import JsonValue

from . import content
from .schema import Report


def shareable(report: Report) -> Report:
    """The report with every path on this machine reduced to its last name."""
    places = sorted(set(_places([report.recipe, report.model.id])), key=len, reverse=True)
    shorter = {place: content.short_id(place) for place in places}
    value = _bare(report.model_dump(mode="json"), shorter)
    return Report.model_validate(value)


def _places(value: JsonValue) -> list[str]:
    if isinstance(value, dict):
        return [place for item in value.values() for place in _places(item)]
    if isinstance(value, list):
        return [place for item in value for place in _places(item)]
    return [value] if isinstance(value, str) and content.is_path(value) else []


def _bare(value: JsonValue, shorter: dict[str, str]) -> JsonValue:
    if isinstance(value, dict):
        return {key: _bare(item, shorter) for key, item in value.items()}
    if isinstance(value, list):
        return [_bare(item, shorter) for item in value]
    if isinstance(value, str):
        for place, name in shorter.items():
            value = value.replace(place, name)
    return value
