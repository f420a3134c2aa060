"""Raw text -> curated documents -> tokens -> shuffled, resumable batches.

python -m data.prepare --config=configs/quickstart.py
"""

from core.command import environment, interrupt

interrupt.watch()
environment.check()
