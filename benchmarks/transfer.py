"""New weights of the embedded model to a CPU server, and how far its log-probs are from the trainer's afterwards.

Each side has one thread, as the launcher gives them on two cores. The peer is the whole start of the server, which is
what new weights would cost without a transfer.
"""

import json
import os
import tempfile
import time
from pathlib import Path

from harness import MODEL, ROOT, Setting, alternate, figure, main, write_report

REPEATS = 5


def worker(variant: str, setting: Setting) -> dict:
    import torch
    from accelerate import Accelerator

    from rlt.generation.served.engine import ServerEngine
    from rlt.launching.servers import Servers
    from rlt.models.embedded import embedded_model_path
    from rlt.models.loading import load_policy, load_tokenizer
    from rlt.planning.configuration import compose_config

    torch.set_num_threads(1)
    path = str(embedded_model_path(MODEL))
    config, _ = compose_config(
        ["run_cfg=teacher_rlt_tiny", f"model_name_or_path={MODEL}", "bf16=false", "weight_transfer=files"]
    )
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        file.write_text(json.dumps({"config": config}), encoding="utf-8")
        servers = Servers([""], 1, Path(folder), file)
        os.environ["RLT_SERVER_KEY"] = servers.key
        start = time.perf_counter()
        servers.start()
        try:
            model = load_policy(path)
            engine = ServerEngine(
                model=model,
                accelerator=Accelerator(cpu=True),
                processing_class=load_tokenizer(path),
                mode="colocate",
                engine_dtype="float32",
                max_completion_length=32,
                temperature=1.0,
                top_k=0,
                generation_kwargs={},
                urls=servers.urls,
                start_limit_s=120,
            )
            if variant == "start":
                return {"seconds": time.perf_counter() - start, "difference": 0.0}
            return measure(engine, model)
        finally:
            servers.close()


def measure(engine, model) -> dict:
    import torch

    seconds, prompt = [], list(range(1000, 1040))
    for _ in range(REPEATS):
        with torch.no_grad():
            next(model.parameters()).mul_(1.001)
        start = time.perf_counter()
        engine.sync_weights()
        seconds.append(time.perf_counter() - start)
    (ids,), (values,) = engine.generate_seeded([prompt], [1])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    ours = logits.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    return {"seconds": sorted(seconds)[REPEATS // 2], "difference": (ours - torch.tensor(values)).abs().max().item()}


def report(out: Path, command: str, settings: list[str]) -> str:
    results = alternate(Path(__file__), ["transfer", "start"], settings, 1, out)
    ours, peer = ([run["seconds"] for run in results[name, settings[0]]] for name in ("transfer", "start"))
    difference = results["transfer", settings[0]][0]["difference"]
    table = write_report(out, [figure("transfer", ours, peer, "s", command)], {"log_prob_difference": difference})
    return f"{table}\nlargest difference of log-probs: {difference:.1e}"


if __name__ == "__main__":
    main(__file__, worker, report, usual=["g8"])
