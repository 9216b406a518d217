"""What the commands print: results as text or JSON, and progress."""

import argparse
import contextlib
import json
import sys


def show(args: argparse.Namespace, value: object, text: str) -> None:
    """Prints the text, or with ``--json`` the value."""
    utf8 = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=2, ensure_ascii=not utf8) if args.json else text, flush=True)


class ProgressBar:
    """A bar on a terminal, a line per stage elsewhere, nothing if quiet. Called with the stage and the fraction done."""

    def __init__(self, *, quiet: bool) -> None:
        self.bar, self.stage, self.quiet = None, None, quiet

    def __enter__(self) -> "ProgressBar":
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=100, bar_format="{desc:10}{bar}{n:3.0f} % {elapsed}", leave=False)
        return self

    def __call__(self, stage: str, fraction: float) -> None:
        if self.bar is not None:
            self.bar.set_description(stage, refresh=False)
            self.bar.update(100 * fraction - self.bar.n)
        elif not self.quiet and stage != self.stage:
            with contextlib.suppress(OSError):  # a full disk must not cost the registration
                print(f"{stage} ...", file=sys.stderr, flush=True)
        self.stage = stage

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()
