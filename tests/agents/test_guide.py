"""The agent that CONTRIBUTING shows how to write passes the check that it is sent to."""

import re
from pathlib import Path

from agents.testing import CHECKS

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def test_the_agent_of_the_guide_passes_the_check_of_the_guide(tmp_path, monkeypatch, capsys):
    section = GUIDE.read_text(encoding="utf-8").split("## Add an agent")[1].split("\n## ")[0]
    agent, check = re.findall(r"^```python\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "awr.py").write_text(agent)
    monkeypatch.syspath_prepend(str(tmp_path))
    exec(check, {})
    assert capsys.readouterr().out.startswith(f"AWR: {len(CHECKS)} checks passed")
