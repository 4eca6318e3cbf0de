"""The package build also builds the guest agent, a static C program, into nagaya/_guest/."""

from __future__ import annotations

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithAgent(build_py):
    """Runs guest/'s Makefile before the Python files are collected."""

    def run(self) -> None:
        target = HERE / "src" / "nagaya" / "_guest"
        subprocess.run(["make", "-s", "-C", str(HERE / "guest"), "install", f"DEST={target}"], check=True)
        super().run()


setup(cmdclass={"build_py": BuildWithAgent})
