"""Which methods of the SDK's clients work: docs/training_api.md prints the table, and it is what the clients say here.

pytest -m slow tests/test_serving_table.py           # RLT_WRITE_TABLE=1 writes it to the page
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import EMBEDDED, ROOT

pytest.importorskip("sqlalchemy")

from serving_process import KEYS  # noqa: E402
from serving_server import server  # noqa: E402
from test_serving_sdk import VERSIONS, environment_of  # noqa: E402

from rlt.models.paths import resolve_model_path  # noqa: E402

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "training_api.md"
START, END = "<!-- table of methods -->", "<!-- end of the table -->"
RUN_S = 500
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "config.json")
# Each refusal: a part of what the client is told, and what the page says of it.
NOT_KEPT = ("404", "refused (404): the service's own administration, not kept here")
REFUSED = {
    "export_session_trace": NOT_KEPT,
    "get_audit_log": NOT_KEPT,
    "get_billing_usage": NOT_KEPT,
    "get_current_checkpoint_storage_usage": NOT_KEPT,
    "whoami": ("requires JWT auth", "refused by the client: keys are plain here"),
}
OWN_FAULTS = {  # of the client, with every server
    ("0.24.1", "get_audit_log_async"): "incorrect event loop",
}


def table_of(version: str, folder: Path) -> dict[str, dict[str, str]]:
    # Clients load a tokenizer from the folder that the server says, or from one of the base model's name.
    for place in (folder, folder / "unigram"):
        place.mkdir()
        for name in TOKENIZER_FILES:
            shutil.copy(Path(resolve_model_path(EMBEDDED)) / name, place / name)
    variables = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    variables |= {"TINKER_API_KEY": KEYS["a"], "TINKER_TELEMETRY": "0", "TINKER_PROJECT_ID": "p", "HF_HUB_OFFLINE": "1"}
    with server(folder) as (_, client):
        variables["TINKER_BASE_URL"] = str(client.base_url)
        command = [environment_of(version), ROOT / "tests" / "sdk_table.py", "unigram"]
        ended = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=RUN_S)
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = json.loads(ended.stdout)
    assert said["version"] == version
    return said["table"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, dict[str, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("table")
    return {version: table_of(version, folder / version) for version in VERSIONS}


def cell(version: str, method: str, outcome: str | None) -> str:
    if outcome is None:
        return "-"
    if outcome == "works":
        return outcome
    if (version, method) in OWN_FAULTS:
        return "the client's own fault: call the plain method"
    return REFUSED[method.removesuffix("_async")][1]


def printed(tables: dict[str, dict[str, dict[str, str]]]) -> str:
    """A plain method and its `_async` twin share a line where they come to the same."""
    lines = [f"| client | method | {' | '.join(VERSIONS)} |", f"|{'---|' * (2 + len(VERSIONS))}"]
    for kind in tables[VERSIONS[0]]:
        rows: dict[str, tuple[str, ...]] = {}
        for method in sorted({name for version in VERSIONS for name in tables[version][kind]}):
            rows[method] = tuple(cell(each, method, tables[each][kind].get(method)) for each in VERSIONS)
        for method, cells in rows.items():
            plain = method.removesuffix("_async")
            if method != plain and rows.get(plain) == cells:
                continue
            twin = rows.get(f"{method}_async") == cells
            lines.append(f"| {kind} | `{method}`{' and `_async`' if twin else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_method_works_or_is_refused_as_documented(tables, version):
    wrong = {}
    for kind, methods in tables[version].items():
        for method, outcome in methods.items():
            expected = OWN_FAULTS.get((version, method)) or REFUSED.get(method.removesuffix("_async"), ("works",))[0]
            if expected not in outcome:
                wrong[f"{kind}.{method}"] = outcome
    assert wrong == {}


def test_the_page_prints_the_table(tables):
    page, table = PAGE.read_text(), printed(tables)
    if os.environ.get("RLT_WRITE_TABLE"):
        before, after = page.split(START)[0], page.split(END)[1]
        page = f"{before}{START}\n{table}\n{END}{after}"
        PAGE.write_text(page)
    assert page.split(START)[1].split(END)[0].strip() == table
