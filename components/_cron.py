"""Lines of cron, checked before a cluster sees them."""

import re

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
    for (name, (least, most)), field in zip(_FIELDS.items(), fields, strict=True):
        if not all(_is_part(part, least, most) for part in field.split(",")):
            rule = f"{name} of cron must be numbers from {least} to {most}"
            raise ValueError(f"{rule}, got {field!r} in {line!r}")


def _is_part(part: str, least: int, most: int) -> bool:
    found = _PART.fullmatch(part)
    if found is None or (found["step"] is not None and int(found["step"]) < 1):
        return False
    first = int(found["first"] or least)
    last = int(found["last"] or (found["first"] or most))
    return least <= first <= last <= most
