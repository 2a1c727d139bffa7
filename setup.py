"""Packaging; the metadata is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# What users run and edit, beside the package in a checkout and inside of it in a wheel (mobius_train/share/).
SHARED = ("assets", "configs", "ds_configs", "slurm", "tools")


class BuildWithShared(build_py):
    """Adds the shared folders to a wheel. An editable installation finds them in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in SHARED:
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    target = Path(self.build_lib, "mobius_train", "share", path)
                    self.mkpath(str(target.parent))
                    self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildWithShared})
