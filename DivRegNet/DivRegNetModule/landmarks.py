"""The landmarks of a result: rows of a table."""

from DivRegNetModule.mrml.geometry import FLIP


def rows(pairs, quality: dict) -> list[tuple[str, str, str, tuple[float, float, float]]]:
    """(label, mm before, mm after, position of the fixed landmark in RAS) of each pair, the largest error first.

    Args:
        pairs: DivRegNetModule.mrml.markups.Pairs, or None.
        quality: with ``landmarks``, in the order of the pairs.
    """
    measured = quality.get("landmarks") or []
    if pairs is None or len(measured) != len(pairs.fixed):
        return []
    order = sorted(range(len(measured)), key=lambda i: -measured[i]["after"])
    return [
        (
            measured[i]["label"],
            f"{measured[i]['before']:.2f}",
            f"{measured[i]['after']:.2f}",
            tuple((pairs.fixed[i] * FLIP).tolist()),
        )
        for i in order
    ]
