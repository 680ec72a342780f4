"""The stages, by the names that the key `stages` has, in the order in which they run."""

from rlt.errors import Refused
from rlt.preparation.clean import Clean
from rlt.preparation.decontamination import Decontamination
from rlt.preparation.exact import Exact
from rlt.preparation.language import Language
from rlt.preparation.near import Near
from rlt.preparation.pack import Pack
from rlt.preparation.pii import Pii
from rlt.preparation.quality import Quality
from rlt.preparation.read import Read
from rlt.preparation.split import Split
from rlt.preparation.stage import Stage
from rlt.preparation.tokens import Tokens
from rlt.preparation.toxicity import Toxicity
from rlt.preparation.write import Write
from rlt.schema import PrepareSettings

# Cheap and local ones first; exact duplicates before near ones, which do not see short texts; personal data before
# both, so that two copies meet which differ in an address; decontamination after them, as there is less to look at.
IN_ORDER: tuple[type[Stage], ...] = (
    *(Read, Clean, Language, Quality, Pii, Toxicity),
    *(Exact, Near, Decontamination, Split, Write, Tokens, Pack),
)
STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in IN_ORDER}


def stages_of(settings: PrepareSettings) -> list[Stage]:
    """The stages of a run, ready to be asked for their passes.

    Raises:
        Refused: one does not exist, stands twice or in another place than its own, or needs one that is left out.
    """
    names = settings.stages
    for name in names:
        if name not in STAGES:
            raise Refused(f"stages: {name!r} does not exist: use some of {', '.join(STAGES)}")
    if names != [name for name in STAGES if name in names]:
        raise Refused(f"stages={names}: each stands once, in this order: {', '.join(n for n in STAGES if n in names)}")
    if Read.name not in names:
        raise Refused(f"stages={names} must begin with {Read.name}")
    if Pack.name in names and Tokens.name not in names:
        raise Refused(f"stages={names}: {Pack.name} needs {Tokens.name} before it")
    return [STAGES[name](settings) for name in names]
