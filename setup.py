"""Put ``configs/`` of the checkout into the built package; everything else about the build is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Build the package with the configs as its data; an editable installation reads those of the checkout."""

    def _map_configs(self) -> dict[str, str]:
        """Return target -> source of every config, relative to the build's folder and to the checkout."""
        sources = sorted(Path("configs").rglob("*.yaml"))
        return {str(Path(self.build_lib, "mtcl", source)): str(source) for source in sources}

    def run(self) -> None:
        """Copy the modules, then the configs."""
        super().run()
        for target, source in {} if self.editable_mode else self._map_configs().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return what the build writes."""
        return [*super().get_outputs(include_bytecode), *({} if self.editable_mode else self._map_configs())]

    def get_source_files(self) -> list[str]:
        """Return what a source distribution has to hold for this build."""
        return [*super().get_source_files(), *self._map_configs().values()]


setup(cmdclass={"build_py": BuildWithConfigs})
