"""A package index on this machine, with a PyTorch of a few bytes for each answer, and a project for setup.sh to set up.

/simple/                what pip and uv ask by default
/pytorch/cpu, /auto     what stands in for PyTorch's own indexes: uv has their addresses built in, so the uv that is
                        installed from here passes everything on to the real one, with `--torch-backend=NAME`
                        turned into this address
"""

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"
PACKAGES = Path(sysconfig.get_path("purelib"))
LIST = f"""# group: base
deepspeed==1.0
pip=={version("pip")}
plain==1.0
setuptools=={version("setuptools")}
torch=={TORCH}
uv==1.0

# group: test
extra==1.0

# group: api
"""
UV = f"""#!/bin/sh
for word; do
  shift
  case "$word" in --torch-backend=*) word="--default-index=$PYTORCH_INDEXES/${{word#*=}}" ;; esac
  set -- "$@" "$word"
done
exec {ROOT}/.venv/bin/uv "$@"
"""


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str], needs: str = "") -> None:
    """A wheel with its metadata beside it, on a page of links that says so: an index's folder of one package."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n" + (
        f"Requires-Dist: {needs}\n" if needs else ""
    )
    files = {
        **files,
        f"{about}/METADATA": metadata,
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: stub\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = 0o100755 << 16  # a regular file that may be run
            archive.writestr(entry, text)
        archive.writestr(f"{about}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"]))
    Path(f"{wheel}.metadata").write_text(metadata)
    link_page(folder, wheel.name, ' data-core-metadata="true"')


def write_installed_wheel(folder: Path, name: str) -> None:
    """The wheel of a package as it is installed here."""
    folder.mkdir(parents=True)
    about = f"{name}-{version(name)}.dist-info"
    wheel = folder / f"{name}-{version(name)}-py3-none-any.whl"
    kept = [
        path
        for top in (name, about, "pkg_resources", "_distutils_hack", "distutils-precedence.pth")
        if top in (name, about) or name == "setuptools"
        for path in [PACKAGES / top, *(PACKAGES / top).rglob("*")]
        if path.is_file() and path.suffix != ".pyc" and path.name not in ("RECORD", "INSTALLER", "REQUESTED")
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        names = [str(path.relative_to(PACKAGES)) for path in kept]
        for path, inside in zip(kept, names, strict=True):
            archive.write(path, inside)
        archive.writestr(f"{about}/RECORD", "".join(f"{inside},,\n" for inside in [*names, f"{about}/RECORD"]))
    link_page(folder, wheel.name)


def link_page(folder: Path, wheel: str, attributes: str = "") -> None:
    (folder / "index.html").write_text(f'<!DOCTYPE html><a href="{wheel}"{attributes}>{wheel}</a>')


def write_torch(folder: Path, build: str) -> None:
    """CPU builds carry it in their version, as on PyTorch's own index; CUDA builds ask for NVIDIA's libraries."""
    shutil.rmtree(folder, ignore_errors=True)
    number = f"{TORCH}+cpu" if build == "cpu" else TORCH
    cuda = None if build == "cpu" else "13.0"
    about = f"__version__ = {number!r}\ncuda = {cuda!r}\n"
    write_wheel(folder, "torch", number, {"torch/version.py": about}, "" if build == "cpu" else "nvidia-cudnn-cu13")


@dataclass
class Index:
    """Where the index listens, what it serves, and what it was asked for."""

    served: Path
    address: str
    asked: list[str] = field(default_factory=list)

    def offer(self, build: str, where: str = "simple") -> None:
        write_torch(self.served / where / "torch", build)

    def torch_wheels_sent(self) -> list[str]:
        return [path for path in self.asked if "/torch-" in path and path.endswith(".whl")]


@contextmanager
def serve_index(folder: Path) -> Iterator[Index]:
    index = Index(folder, "")
    scripts = {"uv-1.0.data/scripts/uv": UV}
    for name, files in (("uv", scripts), ("plain", {}), ("extra", {}), ("deepspeed", {})):
        write_wheel(folder / "simple" / name, name, "1.0", {f"{name}.py": "", **files})
    for name in ("pip", "setuptools"):
        write_installed_wheel(folder / "simple" / name, name)

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-") -> None:
            index.asked.append(self.path)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    index.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield index
    finally:
        server.shutdown()
        server.server_close()


class Project:
    """A project of setup.sh, two lists and a module, on a machine with or without a GPU."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder / "project", index
        self.folder.mkdir()
        shutil.copy(ROOT / "setup.sh", self.folder)
        for name in ("requirements.txt", "requirements-cpu.txt"):
            (self.folder / name).write_text(LIST)
        self.tools = folder / "tools"
        self.tools.mkdir()
        self.gpus(0)

    def gpus(self, number: int) -> None:
        tool = self.tools / "nvidia-smi"
        tool.write_text("#!/bin/sh\n" + (f"echo 'GPU 0: of {number}'\n" if number else "exit 9\n"))
        tool.chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        return {
            "PATH": f"{self.tools}:/usr/bin:/bin",
            "HOME": str(self.tools),
            "PYTHON": sys.executable,
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_INDEX_URL": f"{self.index.address}/simple",
            "UV_DEFAULT_INDEX": f"{self.index.address}/simple",
            "UV_NO_CONFIG": "1",
            "PYTORCH_INDEXES": f"{self.index.address}/pytorch",
            **variables,
        }

    def start(self, *groups: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.folder / "setup.sh", *groups],
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def set_up(self, *groups: str, **variables: str) -> tuple[int, str]:
        """The exit status and what was said."""
        with self.start(*groups, **variables) as process:
            said, _ = process.communicate(timeout=200)
        return process.returncode, said

    def installed(self) -> dict[str, str]:
        """Versions by name, without the installers and the project."""
        packages = next((self.folder / ".venv" / "lib").glob("python*")) / "site-packages"
        found = (folder.name.removesuffix(".dist-info").split("-") for folder in packages.glob("*.dist-info"))
        return {name: number for name, number in found if name not in ("pip", "setuptools", "uv")}
