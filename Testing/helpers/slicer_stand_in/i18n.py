"""``slicer.i18n`` without translations."""


def tr(text: str) -> str:
    return text


def translate(context: str, text: str) -> str:
    return text
