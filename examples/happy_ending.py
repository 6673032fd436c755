"""A reward of one's own: a story should end well.

Pass it by file and name:  textenv train PPO textenv/Prompts-v0 --reward examples/happy_ending.py:happy_ending ...
"""

HAPPY = {"happy", "glad", "proud", "smiled", "laughed", "hugged", "fun", "love", "loved", "thanked", "safe"}
SAD = {"sad", "cried", "crying", "scared", "angry", "hurt", "alone", "lost", "sorry"}


def happy_ending(completions: list[str], **columns: list[object]) -> list[float]:
    """1 if the last 15 words hold a happy word, -1 if they hold a sad one, 0 if neither or both."""
    rewards = []
    for completion in completions:
        ending = {word.strip(".,!?\"'").lower() for word in completion.split()[-15:]}
        rewards.append(float(bool(ending & HAPPY)) - float(bool(ending & SAD)))
    return rewards
