"""``divregnet models``: the models that can be used."""

import argparse
import textwrap
from dataclasses import asdict

from DivRegNetLib.errors import ModelError
from DivRegNetLib.run.cli.output import show

DESCRIPTION = "List the bundled models and your own."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None beside those of every command."""


def run(args: argparse.Namespace) -> None:
    from DivRegNetLib import models

    listed, lines = [], []
    for name, file in models.card_files().items():
        try:
            card = models.read_card(file)
        except ModelError as error:
            listed.append({"name": name, "error": str(error)})
            lines.append(f"{name}: cannot be used: {error}")
            continue
        listed.append(asdict(card) | {"card": str(file)})
        modalities = ", ".join(map(str, card.modalities))
        spacing = f"{card.spacing_mm:g} mm" if card.spacing_mm else "any resolution"
        lines.append(f"{name} {card.version}: {card.summary} ({card.anatomy}; {modalities}; {spacing})\n  {file}")
        classes = ", ".join(map(str, card.classes[1:]))
        advice = {"good for": card.good_for, "limits": card.limits, "guided by classes": classes}
        lines += [
            textwrap.fill(f"{k}: {v}", 100, initial_indent="  ", subsequent_indent="    ")
            for k, v in advice.items()
            if v
        ]
    show(args, listed, "\n".join(lines) or "no models")
