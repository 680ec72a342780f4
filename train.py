"""Every run, as one process: `python train.py [RUN] [key=value ...]`; `python train.py --help` lists runs and keys."""

from rlt.survival.early import end_when_asked

end_when_asked()  # before imports that take seconds

from rlt.commands.train import main  # noqa: E402

if __name__ == "__main__":
    main()
