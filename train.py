"""Every run, as one process: `python train.py [RUN] [key=value ...]`; `python train.py --help` lists runs and keys."""

from rlt.commands.train import main

if __name__ == "__main__":
    main()
