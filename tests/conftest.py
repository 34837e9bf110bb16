"""What all tests have in common: the switches that keep them fast."""

import gc
import os

# Programs are proved where a test is about proofs; a proof of every program that tests compile would double their time.
os.environ.setdefault("FOLDCC_VERIFY", "0")
# No test depends on what earlier ones left on disk.
os.environ.setdefault("FOLDCC_PROGRAMS", "0")
# Graphs are many small objects, and most of them live as long as a test.
gc.set_threshold(100_000, 10, 20)


def pytest_collection_finish() -> None:
    """What is imported by now stays, so that looking for garbage need not look at it each time."""
    gc.collect()
    gc.freeze()
