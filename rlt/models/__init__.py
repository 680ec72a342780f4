"""Loading models and tokenizers, and which frozen model is resident when."""

import os
import shutil

if shutil.which("nvidia-smi") is None:
    # transformers imports DeepSpeed where it is installed. Without this DeepSpeed prints that it found no GPU.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
