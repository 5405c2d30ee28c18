"""Read variants.yaml."""

from functools import reduce
from pathlib import Path

import yaml

VARIANTS = yaml.safe_load((Path(__file__).parent / "variants.yaml").read_text())


def merged(below: dict, above: dict) -> dict:
    """`below` with `above` written over it, at every depth."""
    both = {
        key: merged(below[key], value) if isinstance(value, dict) and isinstance(below.get(key), dict) else value
        for key, value in above.items()
    }
    return {**below, **both}


def variant(name: str) -> dict:
    """The changes of one entry of variants.yaml, or of several joined by "+". Raises ValueError for an unknown one."""
    unknown = [part for part in name.split("+") if part not in VARIANTS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not in benchmarks/variants.yaml. There are: {', '.join(VARIANTS)}")
    return reduce(merged, (VARIANTS[part] for part in name.split("+")))
