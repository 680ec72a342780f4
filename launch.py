"""A run on several devices: `python launch.py DEVICES [RUN] [SHARDING] [key=value ...]` (./launch.sh sets it up)."""

from rlt.survival.early import end_when_asked

end_when_asked()  # before imports that take seconds

from rlt.commands.launch import main  # noqa: E402

if __name__ == "__main__":
    main()
