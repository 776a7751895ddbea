"""The build as setuptools sees it: a ``build_ext`` that hands over to ``build_extensions``."""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_ext import build_ext

from .extensions import NAMES, REPORT_NAME, build_extensions, library_name, summary

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sdp_kernels"


class BuildKernels(build_ext):
    """Builds into the source tree for an editable install or ``--inplace``, into the wheel's tree otherwise."""

    def run(self) -> None:
        self._report = build_extensions(ROOT, self._package_dir())
        print(summary(self._report), flush=True)

    def _package_dir(self) -> Path:
        return ROOT / PACKAGE if self.inplace else Path(self.build_lib).resolve() / PACKAGE

    def _files(self) -> list[str]:
        names = [*(library_name(name) for name in NAMES), REPORT_NAME]
        return [name for name in names if (self._package_dir() / name).is_file()]

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib, PACKAGE, name)) for name in self._files()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {str(Path(self.build_lib, PACKAGE, name)): str(Path(PACKAGE, name)) for name in self._files()}

    def get_source_files(self) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file())
