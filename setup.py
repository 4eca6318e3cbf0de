"""The package build also builds the guest agent, a static C program, into nagaya/_guest/."""

from __future__ import annotations

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithAgent(build_py):
    """Runs guest/'s Makefile before the Python files are collected."""

    def run(self) -> None:
        target = HERE / "src" / "nagaya" / "_guest"
        subprocess.run(["make", "-s", "-C", str(HERE / "guest"), "install", f"DEST={target}"], check=True)
        super().run()


class WheelForThisMachine(bdist_wheel):
    """Any Python, but one kind of CPU: the agent inside is a program."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildWithAgent, "bdist_wheel": WheelForThisMachine})
