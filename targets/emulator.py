"""Executing arm64 packages on x86: QEMU in user mode, with Debian's arm64 Python and the aarch64 TVM runtime.

`python -m targets.emulator install` fetches all of it (about 190 MB, 170 MB once unpacked) into the tool cache,
without root and without a change to the system; `python -m targets.emulator status` says whether that is needed.
What it computes is what an Arm machine would; how long it takes says nothing about one.
"""

from __future__ import annotations

import compileall
import fcntl
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from py_compile import PycInvalidationMode

from targets.base import Target
from targets.cache import cache_directory
from targets.errors import ToolchainError

_INSTALL = "run 'python -m targets.emulator install'"

# Raised whenever what `install` puts together changes.
_LAYOUT_VERSION = 1

# QEMU comes from the backports: from version 8.2 on it shows the emulated CPU's features in /proc/cpuinfo.
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SOURCES = (
    "deb [arch=arm64 signed-by={keyring}] http://deb.debian.org/debian bookworm main\n"
    "deb [arch=amd64 signed-by={keyring}] http://deb.debian.org/debian bookworm-backports main\n"
)
_QEMU_PACKAGE = "qemu-user"
_SYSTEM_PACKAGES = (
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib"),
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "libbz2-1.0", "liblzma5"),
)
_WHEELS = ("apache-tvm", "apache-tvm-ffi", "blake3", "numpy", "ml_dtypes", "typing_extensions")
_WHEEL_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64")

# The compiler is twenty times as large as the rest together, and nothing compiles under the emulator.
_LEFT_OUT_OF_WHEELS = ("tvm/lib/libtvm_compiler.so", "tvm/3rdparty/", "tvm/include/", "tvm/src/")

_QEMU = Path("bin/qemu-aarch64")
_SYSTEM = Path("system")
_PYTHON = _SYSTEM / "usr/bin/python3.11"
_SITE = Path("site")
_STAMP = Path("installed.json")


@dataclass(frozen=True)
class Emulator:
    """An emulated arm64 machine with Python 3.11 and TVM's runtime, kept in `folder`."""

    folder: Path = field(default_factory=lambda: cache_directory("aarch64"))

    def available(self) -> str | None:
        """Return None when the emulator can be used, else the reason why not, with the fix."""
        try:
            found = json.loads((self._machine / _STAMP).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"the arm64 emulator is not installed: {_INSTALL}"
        if found != _wanted():
            return f"the arm64 emulator was installed for other versions: {_INSTALL}"
        return None

    def install(self, report: Callable[[str], None] = lambda _: None) -> None:
        """Fetch and unpack what is missing; `report` is told each step. Raises ToolchainError.

        An installation that fits is left alone. One process installs, others wait for it.
        """
        with _locked(self.folder / "lock"):
            if self.available() is None:
                return
            _require_host_tools()
            with tempfile.TemporaryDirectory(dir=self.folder) as name:
                work = Path(name)
                report("fetching QEMU and Debian's arm64 Python")
                _install_system(work / "machine", work / "packages")
                report("fetching the aarch64 TVM runtime")
                _install_wheels(work / "machine" / _SITE, work / "wheels")
                report("compiling Python sources")
                _compile_python(work / "machine")
                (work / "machine" / _STAMP).write_text(json.dumps(_wanted()), encoding="utf-8")
                shutil.rmtree(self._machine, ignore_errors=True)
                (work / "machine").rename(self._machine)

    def run(
        self,
        arguments: Sequence[str],
        target: Target,
        *,
        env: Mapping[str, str] | None = None,
        python_path: Sequence[Path] = (),
        timeout: float = 600.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with `arguments` (a script or "-c", code) on a machine that has the target's features.

        numpy, blake3, tvm_ffi and tvm (its runtime only) can be imported, and what lies in `python_path`. Output is
        captured. Raises ToolchainError when the emulator is not installed, the target is not one that it
        emulates, or `timeout` seconds pass.
        """
        command, environment = self.program(arguments, target, env=env, python_path=python_path)
        try:
            return subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ToolchainError(f"the emulated program took over {timeout:.0f} s; allow it more") from error

    def program(
        self,
        arguments: Sequence[str],
        target: Target,
        *,
        env: Mapping[str, str] | None = None,
        python_path: Sequence[Path] = (),
    ) -> tuple[list[str], dict[str, str]]:
        """Return the command that `run` would run, and its environment; raises ToolchainError where it would."""
        reason = self.available()
        if reason is not None:
            raise ToolchainError(reason)
        if target.emulated_cpu is None:
            raise ToolchainError(f"target '{target.name}' is not emulated; run its package on such a machine")
        # Variables that would lead the emulated loader or Python to this machine's own libraries.
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LD_", "PYTHON"))}
        machine = self._machine
        environment = {
            **inherited,
            # Else numpy starts threads that nothing uses, which is a third of what importing it takes here.
            "OPENBLAS_NUM_THREADS": "1",
            **(env or {}),
            "QEMU_CPU": target.emulated_cpu,
            "TVM_USE_RUNTIME_LIB": "1",
            "PYTHONPATH": os.pathsep.join(str(path) for path in (*python_path, machine / _SITE)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONNOUSERSITE": "1",
        }
        return [str(machine / _QEMU), "-L", str(machine / _SYSTEM), str(machine / _PYTHON), *arguments], environment

    @property
    def _machine(self) -> Path:
        return self.folder / "machine"


def _wanted() -> dict[str, object]:
    """What an installation must be made of: the versions that this environment itself has."""
    return {"layout": _LAYOUT_VERSION, "wheels": [f"{name}=={importlib.metadata.version(name)}" for name in _WHEELS]}


def _require_host_tools() -> None:
    if platform.machine() != "x86_64":
        raise ToolchainError("the emulator is made for x86-64 machines; on arm64, packages run without it")
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ToolchainError(f"'{tool}' is missing: the arm64 emulator can be installed on Debian and its kin only")
    if not _KEYRING.exists():
        raise ToolchainError("Debian's keys are missing: run 'apt-get install debian-archive-keyring' as root")


def _install_system(machine: Path, packages: Path) -> None:
    """Download Debian packages with apt's own verification, into folders of ours, and unpack them."""
    state = packages / "state"
    for folder in (state / "lists/partial", packages / "cache/archives/partial"):
        folder.mkdir(parents=True)
    (state / "status").touch()
    (packages / "sources.list").write_text(_SOURCES.format(keyring=_KEYRING), encoding="utf-8")
    settings = {
        "Dir::State": state,
        "Dir::State::Lists": state / "lists",
        "Dir::State::Status": state / "status",
        "Dir::Cache": packages / "cache",
        "Dir::Etc::SourceList": packages / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    apt_get = ["apt-get", *(f"-o{key}={value}" for key, value in settings.items()), "-q"]
    _call([*apt_get, "update"], packages)
    _call([*apt_get, "download", f"{_QEMU_PACKAGE}:amd64", *_SYSTEM_PACKAGES], packages)
    (machine / _SYSTEM).mkdir(parents=True)
    for archive in sorted(packages.glob("*.deb")):
        if archive.name.startswith(_QEMU_PACKAGE + "_"):
            _unpack_file(archive, "./usr/bin/" + _QEMU.name, machine / _QEMU)
        else:
            _call(["dpkg-deb", "--extract", str(archive), str(machine / _SYSTEM)], packages)


def _unpack_file(archive: Path, name: str, path: Path) -> None:
    """Write one program of a Debian package, which holds dozens of its size, to `path`."""
    content = subprocess.run(["dpkg-deb", "--fsys-tarfile", archive], capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(content)) as files:
        program = files.extractfile(name)
        assert program is not None
        path.parent.mkdir(parents=True)
        path.write_bytes(program.read())
    path.chmod(0o755)


def _install_wheels(site: Path, wheels: Path) -> None:
    wheels.mkdir()
    platforms = [option for name in _WHEEL_PLATFORMS for option in ("--platform", name)]
    requirements = [f"{name}=={importlib.metadata.version(name)}" for name in _WHEELS]
    _call(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(wheels), "--no-deps"),
            *("--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"),
            *platforms,
            *requirements,
        ],
        wheels,
    )
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as files:
            for name in files.namelist():
                if not name.startswith(_LEFT_OUT_OF_WHEELS) and "/tests/" not in name:
                    files.extract(name, site)


def _compile_python(machine: Path) -> None:
    """Compile the emulated machine's Python sources here, where it takes seconds instead of a minute."""
    if sys.version_info[:2] != (3, 11):
        return
    for folder in (machine / _SITE, machine / _SYSTEM / "usr/lib/python3.11"):
        with redirect_stdout(io.StringIO()):  # some test files of these packages are not meant to compile
            compileall.compile_dir(folder, quiet=2, invalidation_mode=PycInvalidationMode.UNCHECKED_HASH, workers=1)


def _call(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ToolchainError(f"cannot run '{command[0]}': {error.strerror}") from error
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise ToolchainError(f"'{Path(command[0]).name}' failed while installing the arm64 emulator: {lines[-1]}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str]) -> int:
    """Install the emulator or say how it stands; return the exit code."""
    emulator = Emulator()
    if list(arguments) == ["install"]:
        try:
            emulator.install(lambda step: print(step, flush=True))
        except ToolchainError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    elif list(arguments) != ["status"]:
        print("usage: python -m targets.emulator install|status", file=sys.stderr)
        return 2
    reason = emulator.available()
    print(reason or f"the arm64 emulator is ready in {emulator.folder}")
    return 0 if reason is None else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
