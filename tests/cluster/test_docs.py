"""The commands of the README and of docs/operations.md, run as they are written, on a network of their own."""

import os
import re
import sys
from pathlib import Path

import pytest
from job_process import ROOT, run_command

APART = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


def first_block(document: str, heading: str) -> str:
    """The first commands below a heading (or a bold text) of a document."""
    text = (ROOT / document).read_text()
    return re.search(r"```bash\n(.*?)```", text[text.index(heading) :], re.DOTALL)[1]  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a network of its own needs root")
@pytest.mark.parametrize(
    ("document", "heading", "said", "report"),
    [
        ("README.md", "**On this machine.**", "finished: best", "report/report.html"),
        ("README.md", "**On a Ray cluster**", "succeeded", "first/report/report.html"),
        ("docs/operations.md", "## Submit", "succeeded", "first/report/report.html"),
    ],
)
def test_the_commands_run_as_they_are_written(
    *, document: str, heading: str, said: str, report: str, tmp_path: Path
) -> None:
    """But for /tmp and /shared, which are folders of the test."""
    script = re.sub(r"(?<![\w/])/(tmp|shared)/", f"{tmp_path}/", first_block(document, heading))
    assert "python jobs/" in script
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "NO_PROXY": "127.0.0.1",
    }
    alone = "ip link set lo up; mkdir -p /tmp/ray; mount -t tmpfs tmpfs /tmp/ray\n"
    code, output = run_command([*APART, "bash", "-ec", alone + script], environment, timeout=580)
    assert code == 0, output
    assert said in output
    assert (tmp_path / report).stat().st_size > 10_000
