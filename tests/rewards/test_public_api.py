import subprocess
import sys

import pytest

import rewards


def test_every_public_name_exists():
    for name in rewards.__all__:
        assert getattr(rewards, name) is not None
    assert sorted(rewards.__all__) == rewards.__all__
    assert dir(rewards) == rewards.__all__


def test_the_list_of_public_names_is_complete():
    imported = {
        name for name, value in vars(rewards).items() if getattr(value, "__module__", "").startswith("rewards.")
    }
    aliases = {"Completion", "RewardFunction"}  # types of typing, which know no module
    assert imported | aliases | set(rewards._LAZY) == set(rewards.__all__)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rewards.nonsense


def test_importing_rewards_imports_neither_torch_nor_transformers():
    code = (
        "import sys, rewards\n"
        "rewards.bind(rewards.exact_match, ['answer'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
