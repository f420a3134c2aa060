"""The folder of a report, checked before the work begins: nothing in it is a user's and replaced.

data, page = folder.claim(Path("runs/quickstart/bench"), "report")
data.write(json.dumps(report))
page.write(output.signed(text))
"""

from pathlib import Path

from core.config import UserError
from core.storage import output
from core.storage.output import File
from evals.report import store
from evals.report.show import figures, plots

FIELD = "bench.output"
KEYS = {"report": ("device", "config", "rows"), "compare": ("reports", "rows")}
TITLES = {"report": "# Context window: ", "compare": "# Context windows compared"}


def claim(folder: Path, name: str) -> tuple[File, File]:
    """Returns `name`.json and `name`.md in `folder`, which is made.

    UserError for a file that is there and not ours, pictures and lines of a sweep included.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{FIELD}={folder} is a file: name a folder")
    other = next(one for one in KEYS if one != name)
    if (folder / f"{other}.json").exists():
        raise UserError(
            f"{FIELD}={folder} holds {other}.json, whose pictures would be replaced: name another"
        )
    data = File(folder / f"{name}.json", FIELD, output.is_json(*KEYS[name]))
    # Pictures of earlier versions have no mark of ours, but the report beside them is ours.
    has_report = (folder / f"{name}.json").is_file()
    for picture in plots.NAMES:
        File(folder / picture, FIELD, lambda content: has_report or figures.is_ours(content))
    if name == "report":
        File(folder / store.NAME, FIELD, store.is_ours)
    return data, File(folder / f"{name}.md", FIELD, output.is_page(TITLES[name]))
