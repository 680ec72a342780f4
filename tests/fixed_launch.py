"""launch.py with ranks whose completions are made up: sampling turns a last bit that differs into another token."""

from pathlib import Path

from rlt.commands import launch

if __name__ == "__main__":
    launch.RANK = (str(Path(__file__).with_name("fixed_rank.py")),)
    launch.main()
