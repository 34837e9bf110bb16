"""Compiled programs, kept on disk: a pipeline that has run over the same program is read, and does not run again.

key         a hash of all that decides what passes make of a program
packed      the stages of a pipeline as bytes, and back; nothing that is read from disk is run
files       one file for each key, of which nobody sees a part; the oldest leave when there are too many
stages      runs passes, or reads what they left
"""

from foldcc.cache.key import Unkept, code
from foldcc.cache.stages import run_or_read

__all__ = ["Unkept", "code", "run_or_read"]
