"""What the configuration of on-policy distillation, and the files that it names, can tell before anything is loaded."""

import json
import logging
from pathlib import Path

from rlt.data.generator import GENERATOR
from rlt.errors import Refused
from rlt.models.files import model_settings
from rlt.planning.memory import model_folder
from rlt.planning.reward_checks import check_verifier
from rlt.prompts.distillation import TEACHER_PROMPTS
from rlt.runs.folder import saved_configuration
from rlt.schema import DistillSettings

TOKENIZER = "tokenizer.json"
NOTHING_TO_LEARN = (
    "teacher_prompt=question with teacher_model={}: a student has nothing to learn from itself behind the same prompt; "
    "set teacher_prompt=solution"
)

logger = logging.getLogger("rlt")


def check_distillation(settings: DistillSettings) -> None:
    """Divergence, prompts and teacher.

    Raises:
        Refused: the first that does not exist or does not fit.
    """
    check_verifier(settings)
    if not 0 <= settings.beta <= 1:
        raise Refused(
            f"beta={settings.beta} must be in [0, 1]: 0 is the forward KL, 1 the reverse KL, between them the "
            "Jensen-Shannon divergence"
        )
    if settings.teacher_prompt not in TEACHER_PROMPTS:
        raise Refused(f"teacher_prompt={settings.teacher_prompt}: use one of {', '.join(TEACHER_PROMPTS)}")
    if settings.teacher_model is None and settings.teacher_prompt == "question":
        raise Refused(NOTHING_TO_LEARN.format("null"))
    targets = settings.lora_target_modules
    if settings.use_peft and not isinstance(targets, str) and "lm_head" in targets:
        raise Refused(f"lora_target_modules={targets}: the loss reads the output head itself; leave lm_head out")
    if settings.teacher_model is not None:
        check_teacher(settings, settings.teacher_model)
    check_models(settings)


def check_models(settings: DistillSettings) -> None:
    """What the files of student and teacher tell, as far as they are here. Where a warm-up will make the student, its
    own model stands for it: it has the same vocabulary.

    Raises:
        Refused: they do not fit.
    """
    check_top_k(settings)
    if settings.teacher_model is None:
        return
    theirs, ours = (vocabulary(name) for name in (settings.teacher_model, settings.model_name_or_path))
    if theirs and ours and theirs != ours:
        raise Refused(another_vocabulary(settings, len(theirs), len(ours)))


def check_top_k(settings: DistillSettings) -> None:
    """Against the vocabulary of a model whose files are here."""
    k = settings.divergence_top_k
    if k is None:
        return
    if k < 1:
        raise Refused(f"divergence_top_k={k} must be positive, or null for the whole vocabulary")
    folder = model_folder({"model_name_or_path": settings.model_name_or_path})
    found = model_settings(folder) if folder else {}
    size = found.get("text_config", found).get("vocab_size")
    if size is not None and k > size:
        raise Refused(f"divergence_top_k={k} is above the {size} tokens of the vocabulary: null takes all of them")


def check_teacher(settings: DistillSettings, teacher: str) -> None:
    """Not in the run's own folder, and not the student itself behind the same prompt; of the student's task."""
    output = Path(settings.output_dir).expanduser().absolute()
    path = Path(teacher).expanduser().absolute()
    if output in (path, *path.parents):
        raise Refused(
            f"teacher_model={teacher} is in output_dir={settings.output_dir}, where the student is written: name "
            "another output_dir"
        )
    if settings.teacher_prompt == "question" and teacher == settings.model_name_or_path:
        raise Refused(NOTHING_TO_LEARN.format(teacher))
    run = saved_configuration(path)
    learned, asked = (task_of(found.get("dataset_id_or_path")) for found in (run or {}, vars(settings)))
    if learned and asked and learned != asked:
        logger.warning(
            "teacher_model=%s was trained on %s, and dataset_id_or_path=%s asks other questions: a teacher that does "
            "not know its student's task leads it away from it",
            teacher,
            learned,
            settings.dataset_id_or_path,
        )


def task_of(source: object) -> str | None:
    """A generator's task, `reasoning_gym/chain_sum`; None for rows from elsewhere, which do not tell theirs."""
    named = isinstance(source, str) and source.startswith(GENERATOR)
    return "/".join(source.split("/")[:2]) if named else None


def another_vocabulary(settings: DistillSettings, theirs: int, ours: int) -> str:
    """Why a teacher cannot be distilled, and what could be used."""
    return (
        f"teacher_model={settings.teacher_model} has another vocabulary ({theirs} tokens) than model_name_or_path="
        f"{settings.model_name_or_path} ({ours}), and distillation compares them token by token: name a teacher of the "
        "student's family, or let it write traces (collect) for student_distill, which reads them as text"
    )


def vocabulary(name: str) -> dict[str, int] | None:
    """Ids of tokens, from a folder's tokenizer; None where there is none here, or it is of another kind."""
    folder = model_folder({"model_name_or_path": name})
    if folder is None or not (folder / TOKENIZER).is_file():
        return None
    try:
        found = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
        words = found["model"]["vocab"]
        words = words if isinstance(words, dict) else {word: number for number, (word, _) in enumerate(words)}
        return {**words, **{token["content"]: token["id"] for token in found.get("added_tokens", ())}}
    except (ValueError, KeyError, TypeError):  # said when it is loaded
        return None
