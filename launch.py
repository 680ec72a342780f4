"""A run on several devices: `python launch.py DEVICES [RUN] [SHARDING] [key=value ...]` (./launch.sh sets it up)."""

from rlt.commands.launch import main

if __name__ == "__main__":
    main()
