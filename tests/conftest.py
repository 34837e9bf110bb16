"""Programs are proved where a test is about proofs; a proof of every program that tests compile would double their time."""

import os

os.environ.setdefault("FOLDCC_VERIFY", "0")
