"""Takes every golden's checkpoint in and out again, for `make.py check` to open.

PYTHONPATH=.:tests/cases python tests/golden/export.py DIR     writes DIR/<case>
"""

import sys
import tempfile
from pathlib import Path

import family_cases as cases

from model import convert

if __name__ == "__main__":
    exports = Path(sys.argv[1])
    exports.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        for name in cases.NAMES:
            bundle = Path(folder, f"{name}-bundle")
            convert.from_hf(cases.write(name, Path(folder)), bundle)
            convert.from_bundle(bundle, exports / name, dtype=None, shard_gb=2.0)
