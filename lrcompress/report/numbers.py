"""How the views write numbers; the only place where a value is rounded or gets a unit."""

import math

from .schema import FRACTIONS, Metric, MetricName, TaskMetric

MISSING = "–"


def significant(value: float, digits: int = 3) -> str:
    """`value` with this many significant digits, thousands grouped, very small ones with an exponent."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{_decimals(value, digits)}f}"


def integer(value: int | None) -> str:
    """An exact count, thousands grouped."""
    return MISSING if value is None else f"{value:,}"


def percent(fraction: float) -> str:
    """A fraction as a number of per cent, without the sign."""
    return f"{100 * fraction:.1f}"


def share(part: float, whole: float) -> str:
    """`part` of `whole` in per cent, without the sign."""
    return percent(part / whole) if whole else MISSING


def size(amount: int | None) -> str:
    """Bytes in the decimal unit that fits."""
    if amount is None:
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= scale:
            return f"{significant(amount / scale)} {unit}"
    return f"{amount} B"


def millions(amount: float) -> str:
    """A count of parameters in the unit that fits."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= scale:
            return f"{significant(amount / scale)} {unit}"
    return f"{amount:,.0f}"


def seconds(value: float | None) -> str:
    """Seconds with their unit."""
    return MISSING if value is None else f"{significant(value)} s"


def optional(value: float | None) -> str:
    """Three significant digits, or a dash."""
    return MISSING if value is None else significant(value)


def metric(name: MetricName, value: float) -> str:
    """A quality without its unit: per cent for fractions, four digits for a perplexity, else three."""
    if name in FRACTIONS:
        return percent(value)
    return significant(value, 4 if name == "token_perplexity" else 3)


def measured(name: MetricName, found: Metric | None) -> str:
    """A quality and its standard error, both to the same decimal."""
    if found is None:
        return MISSING
    text = metric(name, found.value)
    return _beside(text, None if found.stderr is None else found.stderr * (100 if name in FRACTIONS else 1))


def task(found: TaskMetric | None) -> str:
    """A task's quality in four digits, as lm-eval prints it, and its standard error to the same decimal."""
    return MISSING if found is None else _beside(significant(found.value, 4), found.stderr)


def _beside(text: str, stderr: float | None) -> str:
    """A number and its standard error."""
    if stderr is None:
        return text
    decimals = len(text.partition(".")[2])
    rounded = f"{stderr:,.{decimals}f}"
    # An error that would round to zero is shown with its own first digit: "± 0.0" would claim certainty.
    vanishes = "e" in text or not float(rounded.replace(",", ""))
    return f"{text} ± {significant(stderr, 1) if vanishes else rounded}"


def _decimals(value: float, digits: int) -> int:
    return max(digits - 1 - math.floor(math.log10(abs(value))), 0)
