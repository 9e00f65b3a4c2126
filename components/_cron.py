"""Lines of cron, checked before a cluster sees them."""

import re
from calendar import monthrange

_FIELDS = {"minute": (0, 59), "hour": (0, 23), "day": (1, 31), "month": (1, 12), "weekday": (0, 6)}
_PART = re.compile(r"(?:\*|(?P<first>[0-9]+)(?:-(?P<last>[0-9]+))?)(?:/(?P<step>[0-9]+))?")


def check_cron(line: str) -> None:
    """Refuse a line that Kubernetes or KFP would take otherwise, or not at all.

    Args:
        line: Minute, hour, day, month and weekday, in numbers: each ``*``, ``2``, ``1-5``, ``*/4``,
            or several of these with commas.

    Raises:
        ValueError: It is none; with the field that is wrong.
    """
    fields = line.split()
    if len(fields) != len(_FIELDS):
        raise ValueError(f"cron must be {' '.join(_FIELDS)}, such as '0 2 * * *', got {line!r}")
    values: dict[str, list[int]] = {}
    for (name, (least, most)), field in zip(_FIELDS.items(), fields, strict=True):
        parts = [_values(part, least, most) for part in field.split(",")]
        if not all(parts):
            rule = f"{name} of cron must be numbers from {least} to {most}"
            raise ValueError(f"{rule}, got {field!r} in {line!r}")
        values[name] = [value for part in parts for value in part]
    longest = max(monthrange(2000, month)[1] for month in values["month"])  # a leap year
    if fields[-1] == "*" and min(values["day"]) > longest:
        raise ValueError(f"day of cron must be one that its months have, got {line!r}")


def _values(part: str, least: int, most: int) -> range:
    """Expand a part of a field; to nothing if it is wrong."""
    found = _PART.fullmatch(part)
    if found is None:
        return range(0)
    first, step = int(found["first"] or least), int(found["step"] or 1)
    last = int(found["last"] or (most if found["step"] else found["first"] or most))
    is_right = least <= first <= last <= most and step > 0
    return range(first, last + 1, step) if is_right else range(0)
