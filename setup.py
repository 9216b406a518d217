"""Adds the package ``training`` to editable installs; everything else is in pyproject.toml.

``training`` belongs to a checkout: it needs the repository's data and configurations, and its name is too general for the
site-packages of a user. So a wheel holds ``DivRegNetLib`` alone, and ``pip install -e .`` makes both importable.
"""

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel


class EditableWheelWithTraining(editable_wheel):
    def finalize_options(self) -> None:
        self.distribution.packages += find_packages(include=["training", "training.*"])
        super().finalize_options()


setup(cmdclass={"editable_wheel": EditableWheelWithTraining})
